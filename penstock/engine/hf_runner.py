"""A model runner over Hugging Face transformers: the same code on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from penstock.core.layout import KVLayout
from penstock.core.operations import ChunkFault, ChunkOutcome
from penstock.device.registry import accelerator_of, known_kinds
from penstock.engine.attention import AttentionArgs, PagedBatch, Pages, attending
from penstock.engine.checkpoint import SERVED_MODELS, load_model
from penstock.engine.checkpoint_folder import CheckpointError, LoadFormat, one_line
from penstock.engine.decode_graphs import DecodeGraphs
from penstock.engine.page_tables import PageTables
from penstock.engine.paged_kernel import GATHERED, LayerKind, VarlenKernel, proven_kernel
from penstock.engine.paged_kv import LayerShape, PagedKV, PagedUpload
from penstock.engine.runner import Chunk, UploadGroup
from penstock.engine.sampling import sample
from penstock.engine.shaped_logits import say_logprobs, shaped
from penstock.engine.upload_source import UploadSource


class _Probe:
    """Sees what each layer hands to attention, and answers zeros."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int] = {}
        self.kinds: dict[tuple[Any, ...], LayerKind] = {}  # one layer of each kind
        self.dtypes: set[torch.dtype] = set()
        self.key_sums: list[float] = []
        self.calls = 0

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        if not getattr(module, "is_causal", True):
            raise CheckpointError(f"{type(module).__name__} is not causal; only causal attention is served")
        layer = int(module.layer_idx)
        self.calls += 1
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.windows[layer] = args.window
        kind = (query.shape[1], self.shapes[layer], args.window, args.sinks is None, args.softcap, args.scaling)
        self.kinds.setdefault(kind, LayerKind(layer, query.shape[1], args))
        self.dtypes.add(key.dtype)
        self.key_sums.append(float(key.double().square().cumsum(-1).sum()))
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))


class HFRunner:
    """Runs a causal LM and owns L1 (see `engine.runner.ModelRunner` for the contract and the threading rule).

    `model_source` is a local checkpoint folder or a hub id (at `revision`); `load_format="dummy"` takes its
    configuration only, with random weights from `seed`. `device="auto"` is CUDA where there is one. `layerwise` uploads
    layer by layer, so that compute can start on layer 0 while the others come; without it whole blocks go up, cheaper
    on a CPU.
    Raises CheckpointError when the model cannot be served.
    """

    def __init__(
        self,
        model_source: str,
        *,
        revision: str | None = None,
        block_tokens: int = 64,
        dtype: str = "auto",
        device: str = "auto",
        load_format: LoadFormat = "auto",
        seed: int = 0,
        max_context_tokens: int | None = None,
        layerwise: bool = True,
        upload_timeout_s: float = 60.0,
    ) -> None:
        self._device = device_of(device)
        loaded = load_model(model_source, load_format, dtype, self._device, seed, revision)
        self._model: Any = loaded.model
        self.folder = loaded.folder
        self.model_id = loaded.identity
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size = int(loaded.config.vocab_size)
        self.max_context_tokens = _context_tokens(loaded.config, max_context_tokens)
        self.layerwise = layerwise
        self.computes_on_host = self._device.type == "cpu"
        self._accelerator = accelerator_of(self._device)
        self.uploads_are_enqueued = self._accelerator.copies_beside_compute
        self.host_node = self._accelerator.numa_node
        self.lost: str | None = None
        self._upload_timeout_s = upload_timeout_s
        probe = self._probe(loaded.config)
        self._dtype = next(iter(probe.dtypes))
        self._windows = frozenset(probe.windows.values())
        self._kinds = tuple(probe.kinds.values())
        self._kernel: VarlenKernel | None = None
        self._graphs = DecodeGraphs(self._accelerator, self._forward)
        self._shapes = tuple(probe.shapes[layer] for layer in range(len(probe.shapes)))
        self.layout = KVLayout(
            block_tokens,
            tuple(shape.elements_per_token * self._dtype.itemsize for shape in self._shapes),
            str(self._dtype).removeprefix("torch."),
        )
        self.notes = _notes(loaded.config, self._shapes)  # what a report of KV sizes should say
        self._kv: PagedKV | None = None
        self._tables = PageTables()

    def _probe(self, config: Any) -> _Probe:
        """Run two tokens through the model to see the KV of each layer; refuse what the interface does not show whole.

        A second run at other positions shows that the model takes its positions from the caller."""
        probe, moved = _Probe(), _Probe()
        name, layers = type(self._model).__name__, int(config.num_hidden_layers)
        ids = torch.tensor([[self.vocab_size // 3, self.vocab_size // 2]], device=self._device)  # no padding among them
        try:
            for target, start in ((probe, 0), (moved, 3)):
                positions = torch.arange(start, start + 2, device=self._device)[None]
                with torch.inference_mode(), attending(target):
                    self._model(input_ids=ids, position_ids=positions, use_cache=False)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.folder}: {name} cannot run: {one_line(error)}; {SERVED_MODELS}") from error
        if probe.calls != layers or sorted(probe.shapes) != list(range(layers)) or len(probe.dtypes) != 1:
            raise CheckpointError(
                f"{self.folder}: {name} called attention {probe.calls} times for {layers} layers; {SERVED_MODELS}"
            )
        if probe.key_sums == moved.key_sums:
            raise CheckpointError(f"{self.folder}: {name} does not take positions from the caller; it must")
        for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
            if (kind == "sliding_attention") != bool(probe.windows[layer]):
                raise CheckpointError(
                    f"{self.folder}: layer {layer} of {name} is {kind} but hands over window {probe.windows[layer]}"
                )
        return probe

    @property
    def device(self) -> torch.device:
        """Where the model and L1 are."""
        return self._device

    @property
    def model(self) -> Any:
        """The model; None after `close`."""
        return self._model

    @property
    def kv(self) -> PagedKV:
        """L1. Raises RuntimeError before `allocate` and after `close`."""
        if self._kv is None:
            raise RuntimeError("L1 is not there: allocate(pages) comes first, close() ends it")
        return self._kv

    def allocate(self, pages: int) -> None:
        """Create L1 with room for `pages` full blocks; once."""
        if self._kv is not None:
            raise RuntimeError("L1 is allocated already")
        try:
            self._kv = PagedKV(self.layout, self._shapes, self._dtype, self._device, pages, self._upload_timeout_s)
        except RuntimeError as error:  # torch's out-of-memory errors, of the host and of CUDA
            size_gb = pages * self.layout.full_block_bytes / 1e9
            raise MemoryError(
                f"L1 of {pages} pages ({size_gb:.2f} GB) does not fit on {self._device}: {error}"
            ) from error
        self._accelerator.use()
        with torch.inference_mode():
            self._kernel = proven_kernel(self._kv, self._kinds)
        self._accelerator.synchronize()

    @property
    def attention_kernel(self) -> str:
        """What attends, in words."""
        return GATHERED if self._kernel is None else self._kernel.name

    def page_lock(self, buffer: memoryview) -> None:
        """Page-lock host memory for direct copies (CUDA); nothing on CPU. Raises DeviceError."""
        self.kv.page_lock(buffer)

    def page_unlock(self, buffer: memoryview) -> None:
        """Give up the page lock of this memory, which no copy uses any more."""
        self.kv.page_unlock(buffer)

    def start_upload(self, blocks: Sequence[tuple[UploadSource, int]], followed: bool = True) -> PagedUpload:
        """Prepare the upload of full blocks `(bytes, page)`; no byte has moved when this returns. Without
        `followed` they go up whole."""
        return self.kv.start_upload(blocks, self.layerwise and followed)

    def upload(self, group: UploadGroup) -> None:
        """Move the group's bytes; returns when they are in L1. On failure `wait_layer` raises as well."""
        self.kv.upload(_paged(group))

    def begin_upload(self, group: UploadGroup) -> None:
        """Enqueue the group's copies; `end_upload` waits for them. On failure `wait_layer` raises as well."""
        self.kv.begin_upload(_paged(group))

    def end_upload(self, group: UploadGroup) -> None:
        """Wait until the bytes of a group that has begun are in L1."""
        self.kv.end_upload(_paged(group))

    def download(self, page: int, into: memoryview) -> None:
        """Copy one full block out of L1; returns when `into` holds it."""
        self.kv.download(page, into)

    def run(self, batch: Sequence[Chunk]) -> list[ChunkOutcome]:
        """Compute a batch; returns per chunk the sampled token id (None where `sampling` is None), once its KV is
        complete in L1, or a ChunkFault: its logits are not numbers, or blocks that it completed are not finite. Raises
        ValueError for a chunk that does not fit, UploadFailed when pending blocks did not come."""
        if not batch:
            return []
        pages = [self._check(chunk) for chunk in batch]
        self._accelerator.use()
        try:
            with torch.inference_mode():
                tokens = self._compute(batch, pages)
                unusable = self._unusable_blocks(batch, tokens)
        finally:
            self._synchronize()
        return [_outcome(*each) for each in zip(batch, tokens, unusable, strict=True)]

    def _synchronize(self) -> None:
        """Wait for the batch, also for one that raised half-way: downloads, uploads and reuse of its pages start
        right after it, on other streams."""
        try:
            self._accelerator.current_stream().synchronize()
        except Exception as error:  # an error of the device that stays: every later call would raise it again
            self.lost = f"the device failed: {one_line(error)}"
            raise

    def _compute(self, batch: Sequence[Chunk], pages: Sequence[Pages]) -> list[int | None]:
        """The sampled token per chunk; None where none was asked for, or the logits give none."""
        sampled = [index for index, chunk in enumerate(batch) if chunk.sampling is not None]
        logits = self._graphs.run(PagedBatch(self.kv, batch, pages, self._windows, self._kernel))
        result: list[int | None] = [None] * len(batch)
        if sampled:
            params = [chunk.sampling for chunk in batch if chunk.sampling is not None]
            chunks = [batch[index] for index in sampled]
            scores = shaped(logits, chunks, self.eos_token_ids)
            counts = [chunk.sampled_index for chunk in chunks]
            tokens = sample(scores, params, counts, self._accelerator.array_to_device)
            say_logprobs(logits, chunks, tokens)
            for index, token in zip(sampled, tokens, strict=True):
                result[index] = token
        return result

    def _forward(self, paged: PagedBatch) -> torch.Tensor:
        """Logits `[sampled rows, vocabulary]`."""
        paged.begin()
        with attending(paged):
            output = self._model(
                input_ids=paged.tokens[None],
                position_ids=paged.positions[None],
                use_cache=False,
                logits_to_keep=paged.sampled_rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _unusable_blocks(self, batch: Sequence[Chunk], tokens: Sequence[int | None]) -> list[frozenset[int]]:
        """Per chunk, the blocks that it filled whose KV is not finite. Whole pages are read once, when they are full:
        little beside computing them, and most batches of decodes fill none. Of a chunk without the token that it was to
        give, all full blocks before it are looked at: they may be the cause."""
        size = self.layout.block_tokens
        filled = [
            range(0 if _lacks_token(chunk, token) else chunk.start // size, (chunk.start + len(chunk.tokens)) // size)
            for chunk, token in zip(batch, tokens, strict=True)
        ]
        pages = [chunk.pages[index] for chunk, indices in zip(batch, filled, strict=True) for index in indices]
        bad = self.kv.not_finite(pages) if pages else set()
        return [
            frozenset(index for index in indices if chunk.pages[index] in bad)
            for chunk, indices in zip(batch, filled, strict=True)
        ]

    def _check(self, chunk: Chunk) -> Pages:
        """The pages that it uses: of a chunk of one token those that are new were looked at. Raises ValueError."""
        end = chunk.start + len(chunk.tokens)
        needed = -(-end // self.layout.block_tokens)
        if not chunk.tokens or chunk.start < 0:
            raise ValueError(f"request {chunk.request_id}: a chunk needs a token and a start of at least 0")
        if end > self.max_context_tokens:
            raise ValueError(f"request {chunk.request_id}: {end} tokens; at most {self.max_context_tokens} are allowed")
        if len(chunk.pages) < needed:
            raise ValueError(f"request {chunk.request_id}: {len(chunk.pages)} pages for {end} tokens; {needed} needed")
        if min(chunk.tokens) < 0 or max(chunk.tokens) >= self.vocab_size:
            raise ValueError(f"request {chunk.request_id}: token ids must be 0 to {self.vocab_size - 1}")
        if len(chunk.tokens) == 1:
            return self._tables.of(chunk, needed, self.kv.pages)
        used = chunk.pages[:needed]  # what comes after the end of the chunk is not looked at
        if min(used) < 0 or max(used) >= self.kv.pages:
            raise ValueError(f"request {chunk.request_id}: pages must be 0 to {self.kv.pages - 1}")
        return used

    def close(self) -> None:
        """Release L1 and the model; may be called again."""
        if self._kv is not None:
            self._kv.close()
            self._kv = None
        self._graphs.clear()
        self._model = None
        self._accelerator.release_cached()


def _paged(group: UploadGroup) -> PagedUpload:
    if not isinstance(group, PagedUpload):
        raise TypeError(f"upload takes what start_upload gave, not {type(group).__name__}")
    return group


def _lacks_token(chunk: Chunk, token: int | None) -> bool:
    return chunk.sampling is not None and token is None


def _outcome(chunk: Chunk, token: int | None, unusable: frozenset[int]) -> ChunkOutcome:
    if _lacks_token(chunk, token):
        return ChunkFault("compute failed: the model's logits for this request are not numbers", unusable)
    return ChunkFault(None, unusable, token) if unusable else token


def device_of(name: str) -> torch.device:
    """The device that `name` means: auto, cpu, cuda, cuda:1, or another kind that is registered. Raises
    CheckpointError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in known_kinds() or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise CheckpointError(f"device {name!r} is unknown; allowed are 'auto', 'cpu', 'cuda', 'cuda:1' and so on")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise CheckpointError(f"device {name!r} was asked for, but torch finds no CUDA device here")
        count = torch.cuda.device_count()
        if int(number or 0) >= count:
            raise CheckpointError(f"device {name!r} was asked for, but there are {count} CUDA devices here")
        return torch.device("cuda", int(number) if number else torch.cuda.current_device())
    return torch.device(name)


def _notes(config: Any, shapes: Sequence[LayerShape]) -> tuple[str, ...]:
    latent = getattr(config, "kv_lora_rank", None)
    if not latent:
        return ()
    ratio = shapes[0].elements_per_token / (latent + getattr(config, "qk_rope_head_dim", 0))
    return (f"KV is stored as expanded keys and values, {ratio:.1f} times the latent form of this model (MLA)",)


def _context_tokens(config: Any, wanted: int | None) -> int:
    known = getattr(config, "max_position_embeddings", None)
    if wanted is not None and wanted < 1:
        raise CheckpointError(f"max_context_tokens is {wanted}; it must be at least 1")
    if known is None and wanted is None:
        raise CheckpointError("the model does not say its context length; give max_context_tokens")
    if known is not None and wanted is not None and wanted > known:
        raise CheckpointError(f"max_context_tokens is {wanted}; the model allows at most {known}")
    return int(wanted if wanted is not None else known or 0)
