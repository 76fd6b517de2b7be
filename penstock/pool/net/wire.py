"""The pool protocol over TCP: greeting, frames, messages.

Every number and every length in a message has bounds, declared with its type. A message outside them is refused
(`decode_request`, `decode_reply`), and ends its connection with one log line.

Both sides first send 8 bytes: magic and protocol version. If both have certificates, TLS begins here
(`pool.net.tls_socket`); if both have a secret, they prove it. Then follow frames: a prefix (header length, payload
length), a msgpack header, padding up to 64 bytes, the raw payload. Replies may arrive in any order; `id` pairs them
with requests.
"""

from __future__ import annotations

import builtins
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.keys import split_keys as split_whole_keys
from penstock.core.new_block import MAC_BYTES, REBUILD_S_MAX, TENANT_BYTES, NewBlock
from penstock.core.pool.copies import copy_of, is_copy, original_of
from penstock.core.spans import SPAN_BLOCKS_MAX, SPAN_BYTES_MAX
from penstock.framing import Greeting, decode
from penstock.framing import ProtocolError as ProtocolError
from penstock.pool.api import Located, PoolError, PoolStat
from penstock.pool.node_backend import BlockOrigin

if TYPE_CHECKING:
    from penstock.pool.net.tls_socket import Stream

GREETING = Greeting("pool", b"PNSTCK", version=4, usual_secret=False)
greeting, check_greeting = GREETING.pack, GREETING.check
SECRET_PURPOSE = b"pool"
PREFIX = struct.Struct("<II")
HEAD_BYTES = 64  # minimum of a frame, so that one receive gets most headers whole
HEADER_BYTES_MAX = 1 << 20
PAYLOAD_BYTES_MAX = 1 << 30
KEYS_PER_MESSAGE = 4096
PROBE_BYTES_MAX = 1 << 20
NODE_ID_BYTES = 16
CHECKSUM_BYTES = 8
STALL_S = 10  # a peer that sends or receives no byte in the middle of a message for so long is gone
LOOK_S = 1.0  # interval of the rate check during a payload
HEADER_S = 20.0  # for a header of more than HEAD_BYTES
HELLO_BYTES_MAX = 1024  # of the header of a connection's first message
GREET_S = 10.0  # from a connection to its Hello
IDLE_S = 60.0  # a client that sends no message for so long is gone; it sends Alive three times as often
TIMEOUT_S_MAX = 86_400.0
KEEPALIVE_S = (30, 10, 3)  # until the kernel's first probe, between probes, probes without an answer
ROUTES_MAX = 4096
ROUTE_LINKS_MAX = 16
LINK_CHARACTERS_MAX = 1024
DETAIL_CHARACTERS_MAX = 4096  # of an error text; longer ones are cut
HAND_OFF_CHARACTERS_MAX = 1024  # `PlacedRequest.hand_off_id` has at most 532
PROMPT_BLOCKS_MAX = 1 << 19  # full blocks of one prompt: 2^23 tokens in blocks of 16
DESCRIPTION_BYTES_MAX = 256 << 10  # of the description of memory for one-sided reads
LEND_BLOCKS_MAX = 256  # of one LendMany
REGIONS_MAX = 4096  # registered parts of a node's memory
SIBLINGS_MAX = 255
LEASE_S_MAX = 30.0  # of what a node lends or grants, whatever a request's timeout
ADDRESS_BYTES_MAX = 1 << 50  # offsets in memory for one-sided reads

# Bounded floats refuse NaN too: it satisfies no comparison.
Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=TIMEOUT_S_MAX)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Keys = Annotated[bytes, Meta(max_length=KEYS_PER_MESSAGE * KEY_BYTES)]
SpanKeys = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=SPAN_BLOCKS_MAX * KEY_BYTES)]
SpanStates = Annotated[bytes, Meta(min_length=1, max_length=SPAN_BLOCKS_MAX)]
SpanChecksums = Annotated[bytes, Meta(max_length=SPAN_BLOCKS_MAX * CHECKSUM_BYTES)]
BlockBytes = Annotated[int, Meta(ge=1, le=PAYLOAD_BYTES_MAX)]
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
Checksum = Annotated[int, Meta(ge=0, extra={"bits": 64})]
Mac = Annotated[bytes, Meta(max_length=MAC_BYTES)]  # as the writer made it; only readers with the pool key verify it
SpanMacs = Annotated[list[Mac], Meta(max_length=SPAN_BLOCKS_MAX)]  # empty: no block has one
Tenant = Annotated[bytes, Meta(max_length=TENANT_BYTES)]
RebuildSeconds = Annotated[float, Meta(ge=0, le=REBUILD_S_MAX)]
Rate = Annotated[float, Meta(ge=0, le=1e18)]
NodeId = Annotated[bytes, Meta(max_length=NODE_ID_BYTES)]
Label = Annotated[str, Meta(max_length=64)]
Name = Annotated[str, Meta(max_length=4096)]
Detail = Annotated[str, Meta(max_length=1 << 16)]
Link = Annotated[str, Meta(max_length=LINK_CHARACTERS_MAX)]
HandOffName = Annotated[str, Meta(max_length=HAND_OFF_CHARACTERS_MAX)]
ClientName = Annotated[bytes, Meta(max_length=64)]
Description = Annotated[bytes, Meta(max_length=DESCRIPTION_BYTES_MAX)]
Offset = Annotated[int, Meta(ge=0, le=ADDRESS_BYTES_MAX)]
Ports = Annotated[list[Annotated[int, Meta(ge=1, le=65535)]], Meta(max_length=SIBLINGS_MAX)]
LeaseId = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
HotBlocks = Annotated[list[Annotated[int, Meta(ge=0, lt=LEND_BLOCKS_MAX)]], Meta(max_length=LEND_BLOCKS_MAX)]


class Hello(msgspec.Struct, array_like=True, tag=1):
    """First request of a connection; `lane` is "read", "write" or "control". A client that is itself a node sends its
    id as `origin`. `own_only`: answer from the node's own members only, not from those on other nodes."""

    lane: Label
    origin: NodeId = b""
    own_only: bool = False


class Read(msgspec.Struct, array_like=True, tag=2):
    """One block; answered by Block or Failed."""

    id: Id
    key: Key
    size_bytes: BlockBytes
    timeout_s: Seconds


class Write(msgspec.Struct, array_like=True, tag=3):
    """One block, or (`copy`) a copy of another node's (`core.pool.copies`); the payload is its bytes. Answered by
    Written or Failed."""

    id: Id
    key: Key
    parent: Key
    size_bytes: BlockBytes
    position: Count
    tenant: Tenant
    rebuild_s: RebuildSeconds
    checksum: Checksum
    timeout_s: Seconds
    mac: Mac = b""
    copy: bool = False

    @classmethod
    def of(cls, id: int, block: NewBlock, checksum: int) -> Write:
        """Without the block's tokens, which stay here, and with no time until its sender gives some."""
        tenant, copy = original_of(block.tenant), is_copy(block.tenant)
        named = (block.key, block.parent, block.size_bytes, block.position, tenant, block.rebuild_s)
        return cls(id, *named, checksum, 0.0, block.mac, copy)

    @property
    def block(self) -> NewBlock:
        """The block as an argument of `Pool.write`."""
        tenant = copy_of(self.tenant) if self.copy else self.tenant
        return NewBlock(self.key, self.parent, self.size_bytes, self.position, tenant, self.rebuild_s, self.mac)


class Lookup(msgspec.Struct, array_like=True, tag=4):
    """`keys` are concatenated; answered by Found. With `origins`, at most a span of them, also with what each block was
    written with; nodes that do not know that leave it out. `brief`: the answer may have one item for all keys."""

    id: Id
    timeout_s: Seconds
    keys: Keys
    origins: bool = False
    brief: bool = False

    def __post_init__(self) -> None:
        if self.origins and len(self.keys) > SPAN_BLOCKS_MAX * KEY_BYTES:
            raise ValueError(f"the origins of more than {SPAN_BLOCKS_MAX} blocks are asked for")


class Evict(msgspec.Struct, array_like=True, tag=5):
    """Drop these blocks; answered by Evicted or Failed."""

    id: Id
    timeout_s: Seconds
    keys: Keys


class Stat(msgspec.Struct, array_like=True, tag=6):
    """State of the node and its pool; answered by Stats or Failed."""

    id: Id
    timeout_s: Seconds


class Corrupt(msgspec.Struct, array_like=True, tag=7):
    """The block that was sent with this checksum and MAC does not match its checksum; or (`refused`) it does, but was
    not written under the reader's pool key. No answer: the node verifies damage itself (`pool.local.suspects`)."""

    key: Key
    checksum: Checksum
    mac: Mac = b""
    refused: bool = False


class Probe(msgspec.Struct, array_like=True, tag=8):
    """Request for `size_bytes` bytes without content, to measure the link; answered by Probed or Failed."""

    id: Id
    size_bytes: Count


class Open(msgspec.Struct, array_like=True, tag=9):
    """To the relay of a decode engine: begin the hand-off `name`. `reads`: also report which blocks it can read from
    the pool. Answered by Opened once there is room, or Failed."""

    id: Id
    name: HandOffName
    reads: bool
    timeout_s: Seconds


class HandedOver(msgspec.Struct, array_like=True, tag=10):
    """All blocks of a hand-off were sent, except `missing` that could not be; `token` is the first token. Answered by
    Accepted or Failed."""

    id: Id
    name: HandOffName
    token: Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)]
    missing: Annotated[int, Meta(ge=0, le=PROMPT_BLOCKS_MAX)]
    timeout_s: Seconds


class Attach(msgspec.Struct, array_like=True, tag=11):
    """To a relay: from now on blocks may be read one-sided, in both directions (`one_sided`). `client` is a unique id,
    `memory` the description with which transport `kind` reads the client's memory. To a pool node, which reads nothing
    of its client's, `client` is empty, and `memory` what the node needs to accept the client. Answered by Attached or
    Failed."""

    id: Id
    client: ClientName
    kind: Label
    memory: Description
    timeout_s: Seconds


class Lend(msgspec.Struct, array_like=True, tag=12):
    """One block, to be read one-sided; answered by Lent or Failed."""

    id: Id
    key: Key
    size_bytes: BlockBytes
    timeout_s: Seconds


class Return(msgspec.Struct, array_like=True, tag=13):
    """A lent block was read. No answer. Without this message the block is freed at the deadline of Lend."""

    lend_id: Id


class Offer(msgspec.Struct, array_like=True, tag=14):
    """A block of a hand-off lies at `offset` of the client's memory, for the relay to read; answered by Written or
    Failed."""

    id: Id
    client: ClientName
    key: Key
    size_bytes: BlockBytes
    checksum: Checksum
    offset: Offset
    timeout_s: Seconds
    mac: Mac = b""


class Alive(msgspec.Struct, array_like=True, tag=15):
    """Shows that the client is alive. No answer; sent only to a node whose Ready has `idle_s`."""


class LendMany(msgspec.Struct, array_like=True, tag=18):
    """Blocks to be read one-sided from a pool node, as many `sizes` as `keys`, which are concatenated; `returned` as by
    ReturnMany. Answered by one or more LentMany, or Failed."""

    id: Id
    keys: Annotated[bytes, Meta(max_length=LEND_BLOCKS_MAX * KEY_BYTES)]
    sizes: Annotated[list[BlockBytes], Meta(min_length=1, max_length=LEND_BLOCKS_MAX)]
    timeout_s: Seconds
    returned: Annotated[list[LeaseId], Meta(max_length=LEND_BLOCKS_MAX)] = []

    def __post_init__(self) -> None:
        if len(self.keys) != KEY_BYTES * len(self.sizes):
            raise ValueError(f"{len(self.keys)} bytes of keys and {len(self.sizes)} sizes")


class ReturnMany(msgspec.Struct, array_like=True, tag=19):
    """Blocks that a pool node lent were read, or nothing is written any more to space that it granted. No answer.
    Without this message a lease runs out."""

    leases: Annotated[list[LeaseId], Meta(max_length=LEND_BLOCKS_MAX)]


class ReadMany(msgspec.Struct, array_like=True, tag=16):
    """A span of blocks of one size, at most `Ready.span_bytes_max` together; answered by Blocks or Failed."""

    id: Id
    keys: SpanKeys
    size_bytes: BlockBytes
    timeout_s: Seconds

    def __post_init__(self) -> None:
        check_span(self.keys, self.size_bytes)

    @property
    def blocks(self) -> int:
        """How many blocks are asked for."""
        return len(self.keys) // KEY_BYTES


class WriteMany(msgspec.Struct, array_like=True, tag=17):
    """A span of blocks of one size and tenant; the payload is their bytes, in order. Answered by WrittenMany or Failed.
    `checksums`: 8 bytes for each key, little-endian. `copy` as in Write."""

    id: Id
    keys: SpanKeys
    parents: SpanKeys
    size_bytes: BlockBytes
    positions: Annotated[list[Count], Meta(max_length=SPAN_BLOCKS_MAX)]
    tenant: Tenant
    rebuilds_s: Annotated[list[RebuildSeconds], Meta(max_length=SPAN_BLOCKS_MAX)]
    checksums: SpanChecksums
    macs: SpanMacs
    timeout_s: Seconds
    copy: bool = False

    def __post_init__(self) -> None:
        check_span(self.keys, self.size_bytes)
        blocks = self.blocks
        found = len(self.parents) / KEY_BYTES, len(self.positions), len(self.rebuilds_s)
        if found != (blocks,) * 3 or len(self.checksums) != blocks * CHECKSUM_BYTES:
            raise ValueError(f"parents, positions, times or checksums are not those of {blocks} blocks")
        if len(self.macs) not in (0, blocks):
            raise ValueError(f"{len(self.macs)} MACs for {blocks} blocks")

    @property
    def blocks(self) -> int:
        """How many blocks are written."""
        return len(self.keys) // KEY_BYTES

    @classmethod
    def of(cls, id: int, blocks: Sequence[NewBlock], checksums: Sequence[int]) -> WriteMany:
        """Without the blocks' tokens, and with no time until its sender gives some."""
        macs = [block.mac for block in blocks]
        return cls(
            id, b"".join(block.key for block in blocks), b"".join(block.parent for block in blocks),
            blocks[0].size_bytes, [block.position for block in blocks], original_of(blocks[0].tenant),
            [block.rebuild_s for block in blocks], pack_checksums(checksums), macs if any(macs) else [], 0.0,
            is_copy(blocks[0].tenant),
        )  # fmt: skip

    def new_blocks(self) -> list[NewBlock]:
        """The blocks as arguments of `Pool.write`."""
        named = zip(
            split_keys(self.keys), split_keys(self.parents), self.positions, self.rebuilds_s,
            self.macs or [b""] * self.blocks, strict=True,
        )  # fmt: skip
        size, tenant = self.size_bytes, copy_of(self.tenant) if self.copy else self.tenant
        return [NewBlock(key, parent, size, at, tenant, rebuild_s, mac) for key, parent, at, rebuild_s, mac in named]


class Grant(msgspec.Struct, array_like=True, tag=35):
    """Space for a span of blocks of one size, to be filled one-sided; answered by Granted or Failed."""

    id: Id
    blocks: Annotated[int, Meta(ge=1, le=SPAN_BLOCKS_MAX)]
    size_bytes: BlockBytes
    timeout_s: Seconds

    def __post_init__(self) -> None:
        if self.blocks * self.size_bytes > SPAN_BYTES_MAX:
            raise ValueError(f"a span of more than {SPAN_BYTES_MAX} bytes")


class Commit(msgspec.Struct, array_like=True, tag=36):
    """The space of a Granted is filled with the blocks of `span`, each padded to a whole number of pages: store them.
    The id and the timeout of `span` mean nothing. Answered by WrittenMany, or by Failed where the grant has ended."""

    id: Id
    lease: LeaseId
    span: WriteMany
    timeout_s: Seconds


def pack_checksums(checksums: Sequence[int]) -> bytes:
    """Checksums as they travel: 8 bytes each, little-endian."""
    return struct.pack(f"<{len(checksums)}Q", *checksums)


def unpack_checksums(packed: bytes) -> tuple[int, ...]:
    """The inverse of `pack_checksums`."""
    return struct.unpack(f"<{len(packed) // CHECKSUM_BYTES}Q", packed)


def check_span(keys: bytes, size_bytes: int) -> None:
    """Raises ValueError for a broken concatenation of keys, or a span of too many bytes."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"{len(keys)} bytes of keys, of {KEY_BYTES} each")
    if len(keys) // KEY_BYTES * size_bytes > SPAN_BYTES_MAX:
        raise ValueError(f"a span of more than {SPAN_BYTES_MAX} bytes")


class Ready(msgspec.Struct, array_like=True, tag=20):
    """Answer to Hello. `node_id` is unique to a node and to a start of it; `read_bytes_per_s` is the sum of its
    members' read bandwidths; `block_bytes_max` the largest block that it can store and serve (0: not known). The node
    ends a connection that sends no message for `idle_s` (0: never). `span_bytes_max`: the bytes of blocks that it reads
    or writes in one message (0: it takes single blocks only). `one_sided`: the transport with which its blocks can be
    read one-sided ("": none). `siblings`: the ports of this host on which other processes of the node serve the rest of
    its members. `copies`: it takes copies of blocks (`core.pool.copies`). Failed instead: the node does not serve this
    client."""

    name: Name
    node_id: NodeId = b""
    read_bytes_per_s: Rate = 0.0
    block_bytes_max: Count = 0
    idle_s: Seconds = 0.0
    span_bytes_max: Count = 0
    one_sided: Label = ""
    siblings: Ports = []
    copies: bool = False


class Block(msgspec.Struct, array_like=True, tag=21):
    """The payload is the block. `hot`: this node's clients read it so often that a copy pays (`core.pool.heat`)."""

    id: Id
    key: Key
    checksum: Checksum
    mac: Mac = b""
    hot: bool = False


class Failed(msgspec.Struct, array_like=True, tag=22):
    """`reason` is one of `PoolError.REASONS`. `detail` is cut, and bytes that are no valid text (such as in a path) are
    replaced."""

    id: Id
    reason: Label
    detail: Detail

    def __post_init__(self) -> None:
        self.detail = self.detail[:DETAIL_CHARACTERS_MAX].encode(errors="replace").decode()


class Written(msgspec.Struct, array_like=True, tag=23):
    """The block of a Write is stored."""

    id: Id


class Origin(msgspec.Struct, array_like=True):
    """What a block was written with, beside its bytes; of a copy, what the original was."""

    parent: Key
    tenant: Tenant
    rebuild_s: RebuildSeconds


class Found(msgspec.Struct, array_like=True, tag=24):
    """For each key its size (0: a miss) and the index of its route in `routes`: its member (with "@" and the address,
    if it is on another node) and the links up to this node. `origins`: for each key what its block was written with, or
    nothing; only where it was asked for. Where a brief answer was asked for, `alike` may be how many keys there are (0:
    it is not brief): all blocks are there, and sizes and members have one item, which is that of each."""

    id: Id
    sizes: Annotated[list[Annotated[int, Meta(ge=0, le=PAYLOAD_BYTES_MAX)]], Meta(max_length=KEYS_PER_MESSAGE)]
    members: Annotated[list[Annotated[int, Meta(ge=0, lt=ROUTES_MAX)]], Meta(max_length=KEYS_PER_MESSAGE)]
    routes: Annotated[list[Annotated[list[Link], Meta(max_length=ROUTE_LINKS_MAX)]], Meta(max_length=ROUTES_MAX)]
    origins: Annotated[list[Origin | None], Meta(max_length=SPAN_BLOCKS_MAX)] = []
    alike: Annotated[int, Meta(ge=0, le=KEYS_PER_MESSAGE)] = 0

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.members):
            raise ValueError(f"{len(self.sizes)} sizes and {len(self.members)} members")
        if self.alike and not (len(self.sizes) == 1 and self.sizes[0]):
            raise ValueError(f"{len(self.sizes)} sizes for {self.alike} blocks that lie alike, or none")
        if max(self.members, default=-1) < len(self.routes):
            return
        if any(size and member >= len(self.routes) for size, member in zip(self.sizes, self.members, strict=True)):
            raise ValueError(f"a hit has a route index outside the {len(self.routes)} routes of the message")


def found(id: int, hits: Sequence[Located | None], origins: Sequence[BlockOrigin | None] = ()) -> Found:
    """The answer to a lookup. A hit whose size or route is out of bounds becomes a miss, so that it does not invalidate
    the other hits of the message."""
    first, count = hits[0] if hits else None, len(hits)
    if first is not None and not origins and hits.count(first) == count:  # most answers
        return found_alike(id, first, count)
    routes: dict[tuple[str, ...], int] = {}  # at most as many as there are keys
    names = list(map(builtins.id, hits))  # pools answer with few different objects
    sizes, members = dict[int, int](), dict[int, int]()
    for name, hit in dict(zip(names, hits, strict=True)).items():
        travels = hit is not None and _travels(hit)
        sizes[name] = hit.size_bytes if hit is not None and travels else 0
        members[name] = routes.setdefault(hit.route, len(routes)) if hit is not None and travels else 0
    written = [
        Origin(one.parent, original_of(one.tenant), one.rebuild_s) if one is not None else None for one in origins
    ]
    each_size, each_member = list(map(sizes.__getitem__, names)), list(map(members.__getitem__, names))
    return Found(id, each_size, each_member, [list(route) for route in routes], written)


def found_alike(id: int, hit: Located, count: int, brief: bool = False) -> Found:
    """The answer to a lookup of so many keys whose blocks all lie so, as `found`."""
    if not _travels(hit):
        return Found(id, [0] * count, [0] * count, [])
    if brief:
        return Found(id, [hit.size_bytes], [0], [list(hit.route)], [], count)
    return Found(id, [hit.size_bytes] * count, [0] * count, [list(hit.route)])


def _travels(hit: Located) -> bool:
    route = hit.route
    named = len(route) <= ROUTE_LINKS_MAX and len(max(route, key=len, default="")) <= LINK_CHARACTERS_MAX
    return named and 0 < hit.size_bytes <= PAYLOAD_BYTES_MAX


class Evicted(msgspec.Struct, array_like=True, tag=25):
    """How many of the keys of an Evict were dropped."""

    id: Id
    blocks: Count


class Stats(msgspec.Struct, array_like=True, tag=26):
    """The answer to Stat."""

    id: Id
    stat: PoolStat


class Probed(msgspec.Struct, array_like=True, tag=27):
    """Answer to Probe; the payload is the requested bytes."""

    id: Id


class Opened(msgspec.Struct, array_like=True, tag=28):
    """One byte for each full block of the prompt: 1: the relay has it; 2: it can read it from the pool; 0: neither."""

    id: Id
    blocks: Annotated[bytes, Meta(max_length=PROMPT_BLOCKS_MAX)]

    def __post_init__(self) -> None:
        if self.blocks.translate(None, b"\0\1\2"):
            raise ValueError("a block's state is none of 0, 1 and 2")


class Accepted(msgspec.Struct, array_like=True, tag=29):
    """The decode engine has accepted the hand-off."""

    id: Id


class Attached(msgspec.Struct, array_like=True, tag=30):
    """`memory` is the description with which the client reads the relay's memory."""

    id: Id
    memory: Description


class Lent(msgspec.Struct, array_like=True, tag=31):
    """The block lies at `offset` of the relay's memory."""

    id: Id
    checksum: Checksum
    offset: Offset
    mac: Mac = b""


class LentBlock(msgspec.Struct, array_like=True):
    """Block number `index` of a LendMany lies at `offset` of region `region`, for as long as `lease` runs. Where it is
    not lent, `reason` is one of `PoolError.REASONS`, and `lease` 0."""

    index: Annotated[int, Meta(ge=0, lt=LEND_BLOCKS_MAX)]
    lease: LeaseId = 0
    region: Annotated[int, Meta(ge=0, lt=REGIONS_MAX)] = 0
    offset: Offset = 0
    checksum: Checksum = 0
    mac: Mac = b""
    reason: Label = ""


class LentMany(msgspec.Struct, array_like=True, tag=34):
    """Blocks of a LendMany, as soon as they are ready; `more`: others follow. The regions are those of the Attached of
    this `epoch`. `hot`, in the first answer: which of the keys of the LendMany are hot, as in Block."""

    id: Id
    epoch: Count
    blocks: Annotated[list[LentBlock], Meta(max_length=LEND_BLOCKS_MAX)]
    more: bool = False
    hot: HotBlocks = []


class Granted(msgspec.Struct, array_like=True, tag=37):
    """The space of a Grant begins at `offset` of region `region`; it may be filled as long as `lease` runs: for the
    timeout of its Grant, LEASE_S_MAX at most. The regions are those of the Attached of this `epoch`. Lease 0: no space
    is free."""

    id: Id
    epoch: Count = 0
    lease: LeaseId = 0
    region: Annotated[int, Meta(ge=0, lt=REGIONS_MAX)] = 0
    offset: Offset = 0


class Blocks(msgspec.Struct, array_like=True, tag=32):
    """Answer to ReadMany, with a result for each of its `keys`: `states` has 0 for a block that is here, else the
    number of its `PoolError.REASONS`, from 1 on. The payload is the blocks that are here, in order. `checksums`: 8
    bytes for each key, little-endian. `detail`: about the first block that is not here. `hot`: which of the keys are
    hot, as in Block."""

    id: Id
    keys: SpanKeys
    states: SpanStates
    checksums: SpanChecksums
    macs: SpanMacs
    detail: Detail = ""
    hot: HotBlocks = []

    def __post_init__(self) -> None:
        blocks = len(self.states)
        check_states(self.states)
        if (len(self.keys), len(self.checksums)) != (blocks * KEY_BYTES, blocks * CHECKSUM_BYTES):
            raise ValueError(
                f"{len(self.keys)} bytes of keys and {len(self.checksums)} of checksums for {blocks} blocks"
            )
        if len(self.macs) not in (0, blocks):
            raise ValueError(f"{len(self.macs)} MACs for {blocks} blocks")
        if max(self.hot, default=-1) >= blocks:
            raise ValueError(f"block {max(self.hot)} of {blocks} is hot")


class WrittenMany(msgspec.Struct, array_like=True, tag=33):
    """Answer to WriteMany and Commit: for each block 0 when it is stored, else the number of its reason, as in Blocks.
    `detail`: about the first block that is not stored."""

    id: Id
    states: SpanStates
    detail: Detail = ""

    def __post_init__(self) -> None:
        check_states(self.states)


def check_states(states: bytes) -> None:
    """Raises ValueError for a state that is neither 0 nor the number of a reason."""
    if max(states) > len(PoolError.REASONS):
        raise ValueError(f"a block's state is {max(states)}; allowed: 0 to {len(PoolError.REASONS)}")


def states_of(errors: Sequence[PoolError | None]) -> tuple[bytes, str]:
    """The states of the blocks of a span that ended so, and the first error's text."""
    first = next((error.detail for error in errors if error is not None), "")
    states = bytes(0 if error is None else PoolError.REASONS.index(error.reason) + 1 for error in errors)
    return states, first[:DETAIL_CHARACTERS_MAX].encode(errors="replace").decode()


def errors_of(states: bytes, detail: str) -> list[PoolError | None]:
    """What `states_of` was made from; every error has the first one's text."""
    return [PoolError(PoolError.REASONS[state - 1], detail) if state else None for state in states]


Request = (
    Hello
    | Read
    | Write
    | Lookup
    | Evict
    | Stat
    | Corrupt
    | Probe
    | Open
    | HandedOver
    | Attach
    | Lend
    | Return
    | Offer
    | Alive
    | ReadMany
    | WriteMany
    | LendMany
    | ReturnMany
    | Grant
    | Commit
)
Answer = (  # replies without payload or error
    Written | WrittenMany | Found | Evicted | Stats | Opened | Accepted | Attached | Lent | LentMany | Granted
)
Reply = Ready | Block | Blocks | Failed | Probed | Answer
ANSWERS: dict[type[Request], type[Reply]] = {  # besides Failed
    Read: Block,
    ReadMany: Blocks,
    Write: Written,
    WriteMany: WrittenMany,
    Lookup: Found,
    Evict: Evicted,
    Stat: Stats,
    Probe: Probed,
    Open: Opened,
    HandedOver: Accepted,
    Attach: Attached,
    Lend: Lent,
    Offer: Written,
    LendMany: LentMany,
    Grant: Granted,
    Commit: WrittenMany,
}

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def frame(message: Request | Reply, payload_bytes: int = 0) -> bytes:
    """Prefix, header and padding of a message; the payload follows it on the wire."""
    header = _encoder.encode(message)
    if len(header) > HEADER_BYTES_MAX:
        raise ProtocolError(f"header of {len(header)} bytes; {HEADER_BYTES_MAX} are allowed")
    return (PREFIX.pack(len(header), payload_bytes) + header).ljust(HEAD_BYTES, b"\0")


class MinimumRate:
    """The minimum rate of a payload: a peer may need `grace_s` more in total than at `bytes_per_s`. Only the time that
    this side waits for the peer counts."""

    __slots__ = ("_bytes_per_s", "_left_s")

    def __init__(self, grace_s: float, bytes_per_s: float) -> None:
        self._left_s = grace_s
        self._bytes_per_s = bytes_per_s

    def moved(self, size_bytes: int, waited_s: float) -> None:
        """Add progress. Raises TimeoutError for a peer that is too slow."""
        self._left_s += size_bytes / self._bytes_per_s - waited_s
        if self._left_s < 0:
            raise TimeoutError(f"the peer moves a payload at less than {self._bytes_per_s / 1024:g} KiB/s")


def receive_exactly(
    sock: Stream,
    into: memoryview,
    idle_s: float | None = None,
    until_s: float | None = None,
    rate: MinimumRate | None = None,
) -> None:
    """Fill `into`. Raises ConnectionError at the end of the stream, TimeoutError when the peer stalls in the middle
    (sockets with SO_RCVTIMEO), when `into` is not full at `until_s`, or when bytes arrive more slowly than `rate`; both
    are checked at each timeout of the socket. The first byte may take `idle_s` seconds (None: as long as any other).
    """
    got, size, begin_s = 0, len(into), time.monotonic()
    looked_s = heard_s = begin_s
    while got < size:
        try:
            received = sock.recv_into(into[got:], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            received = -1
        now_s = time.monotonic()
        if received == 0:
            raise ConnectionError("the peer closed the connection")
        if received > 0:
            got += received
            heard_s = now_s
        elif got or idle_s is None:
            if rate is None or now_s - heard_s >= STALL_S:
                raise TimeoutError(f"the peer sent nothing for {STALL_S} s in the middle of a message")
        elif now_s - begin_s >= idle_s:
            raise TimeoutError(f"the peer sent no message for {idle_s:g} s")
        if until_s is not None and got < size and now_s >= until_s:
            raise TimeoutError("the peer did not send all of a message in time")
        if rate is not None and got < size:
            rate.moved(max(received, 0), now_s - looked_s)
        looked_s = now_s


def receive_pieces(sock: Stream, into: memoryview, piece_bytes: int) -> Iterator[memoryview]:
    """Fill `into`; yields each part of it of at most `piece_bytes` as soon as it is there. Raises as `receive_exactly`,
    which costs more for each piece: it also watches a rate."""
    got, size = 0, len(into)
    while got < size:
        piece = into[got : got + piece_bytes]
        try:
            received = sock.recv_into(piece, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError(f"the peer sent nothing for {STALL_S} s in the middle of a message") from None
        if not received:
            raise ConnectionError("the peer closed the connection")
        got += received
        yield piece[:received]


def receive_scattered(sock: Stream, views: Sequence[memoryview]) -> None:
    """Fill the views in order; raises as `receive_exactly`."""
    if len(views) == 1 or not isinstance(sock, socket.socket):
        for view in views:
            receive_exactly(sock, view)
        return
    left = list(views)
    while left:
        try:
            received = sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise TimeoutError(f"the peer sent nothing for {STALL_S} s in the middle of a message") from None
        if not received:
            raise ConnectionError("the peer closed the connection")
        drop_received(left, received)


def drop_received(left: list[memoryview], received: int) -> None:
    """Take as many bytes as were received off the beginning of the views."""
    filled = 0
    while filled < len(left) and received >= len(left[filled]):
        received -= len(left[filled])
        filled += 1
    del left[:filled]
    if received:
        left[0] = left[0][received:]


def frame_lengths(head: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Lengths of header and payload of the frame that begins with `head`. Raises ProtocolError when they are too
    large."""
    header_bytes, payload_bytes = PREFIX.unpack_from(head)
    if header_bytes > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise ProtocolError(
            f"frame of {header_bytes} + {payload_bytes} bytes; "
            f"{HEADER_BYTES_MAX} + {PAYLOAD_BYTES_MAX} are allowed (is the peer a Penstock pool?)"
        )
    return header_bytes, payload_bytes


class FrameReader:
    """Reads frame heads of one connection into one small buffer."""

    def __init__(self, sock: Stream) -> None:
        self._sock = sock
        self._head = memoryview(bytearray(HEAD_BYTES))

    def next(self, idle_s: float = float("inf"), until_s: float | None = None) -> tuple[memoryview, int]:
        """Header and payload length of the next frame, which must begin within `idle_s` seconds; its header must be
        complete at `until_s`, or else HEADER_S after it began. The caller receives the payload. Raises OSError or
        ProtocolError."""
        receive_exactly(self._sock, self._head, idle_s, until_s)
        header_bytes, payload_bytes = frame_lengths(self._head)
        room = HEAD_BYTES - PREFIX.size
        if header_bytes <= room:
            return self._head[PREFIX.size : PREFIX.size + header_bytes], payload_bytes
        header = memoryview(bytearray(header_bytes))
        header[:room] = self._head[PREFIX.size :]
        receive_exactly(self._sock, header[room:], until_s=until_s or time.monotonic() + HEADER_S)
        return header, payload_bytes


def decode_request(header: memoryview) -> Request:
    """Raises ProtocolError for bytes that are no message, or whose numbers or lengths are out of bounds."""
    return decode(_requests, header, "request")


def decode_reply(header: bytes | memoryview) -> Reply:
    """Raises ProtocolError as `decode_request`."""
    return decode(_replies, header, "reply")


def split_keys(keys: bytes) -> list[BlockKey]:
    """Split concatenated keys. Raises ProtocolError for a broken or too long concatenation."""
    check_keys(keys)
    return split_whole_keys(keys)


def check_keys(keys: bytes) -> None:
    """Raises ProtocolError for a broken or too long concatenation of keys."""
    if len(keys) % KEY_BYTES or len(keys) > KEYS_PER_MESSAGE * KEY_BYTES:
        raise ProtocolError(f"{len(keys)} bytes of keys; at most {KEYS_PER_MESSAGE} keys of {KEY_BYTES} bytes")


def set_timeouts(sock: Stream) -> None:
    """Set the kernel's limits for a peer that stalls, or disappeared without closing (its host lost power, a NAT
    dropped the flow). The socket stays blocking, so that threads can send and receive at the same time."""
    idle, every, probes = KEEPALIVE_S
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (idle + every * probes))
    _set_limit(sock, socket.SO_SNDTIMEO, min(LOOK_S, STALL_S))
    _set_limit(sock, socket.SO_RCVTIMEO, STALL_S)


def watch_payload(sock: Stream, under_way: bool) -> None:
    """During a payload over TLS, let a receive end every LOOK_S, so that `receive_exactly` can check the rate."""
    _set_limit(sock, socket.SO_RCVTIMEO, min(LOOK_S, STALL_S) if under_way else STALL_S)


def _set_limit(sock: Stream, option: int, limit_s: float) -> None:
    seconds = int(limit_s)
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, int((limit_s - seconds) * 1e6)))


def send_all(
    sock: Stream,
    *parts: bytes | memoryview,
    until_s: float | None = None,
    rate: MinimumRate | None = None,
) -> None:
    """Send all parts in order, without joining them. Raises OSError, also when the peer receives nothing for STALL_S,
    has not received all at `until_s`, or receives more slowly than `rate`; all are checked every LOOK_S."""
    views = [memoryview(part) for part in parts if len(part)] if len(parts) > 1 else [memoryview(parts[0])]
    moved_s = looked_s = time.monotonic()
    while views:
        try:
            sent = sock.sendmsg(views)
        except BlockingIOError:
            sent = 0
        if rate is None and len(views) == 1 and sent == len(views[0]):  # nearly always
            return
        now_s = time.monotonic()
        moved_s = now_s if sent else moved_s
        if now_s - moved_s >= STALL_S:
            raise TimeoutError(f"the peer took nothing for {STALL_S} s")
        if rate is not None:
            rate.moved(sent, now_s - looked_s)
        looked_s = now_s
        while views and sent >= len(views[0]):
            sent -= len(views[0])
            del views[0]
        if sent:
            views[0] = views[0][sent:]
        if until_s is not None and views and now_s >= until_s:
            raise TimeoutError("the peer did not take all of a message in time")
