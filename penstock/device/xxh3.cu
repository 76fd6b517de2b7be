// xxh3-64 with a seed, as `pool.checksum` computes it, of many blocks of one size in a device's memory; for blocks of
// more than 240 bytes (XXH3_hashLong_64b_withSeed). Source: xxhash.h of XXH3 (github.com/Cyan4973/xxHash).
//
// Within a KiB the sums of its 16 stripes do not depend on each other, nor on the KiB before: `xxh3_sums` computes them
// all at once. What is left is a chain of one step per KiB in each of a block's 8 lanes: `xxh3_chain`.
//
// Compiled by NVRTC for the device that is there; by a host's C++ compiler in tests.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 8
#define STRIPE_BYTES 64
#define STRIPES 16  // of one KiB: as many secrets as the 192 bytes have, 8 bytes apart
#define KIB 1024

#define PRIME32_1 0x9E3779B1ULL
#define PRIME64_1 0x9E3779B185EBCA87ULL

__device__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ULL, 0x1cad21f72c81017cULL, 0xdb979083e96dd4deULL, 0x1f67b3b7a4a44072ULL,
    0x78e5c0cc4ee679cbULL, 0x2172ffcc7dd05a82ULL, 0x8e2443f7744608b8ULL, 0x4c263a81e69035e0ULL,
    0xcb00c391bb52283cULL, 0xa32e531b8b65d088ULL, 0x4ef90da297486471ULL, 0xd8acdea946ef1938ULL,
    0x3f349ce33f76faa8ULL, 0x1d4f0bc7c7bbdcf9ULL, 0x3159b4cd4be0518aULL, 0x647378d9c97e9fc8ULL,
    0xc3ebd33483acc5eaULL, 0xeb6313faffa081c5ULL, 0x49daf0b751dd0d17ULL, 0x9e68d429265516d3ULL,
    0xfca1477d58be162bULL, 0xce31d07ad1b8f88fULL, 0x280416958f3acb45ULL, 0x7e404bbbcafbd7afULL,
};

__device__ const u64 FIRST[LANES] = {
    0xC2B2AE3DULL,         0x9E3779B185EBCA87ULL, 0xC2B2AE3D27D4EB4FULL, 0x165667B19E3779F9ULL,
    0x85EBCA77C2B2AE63ULL, 0x85EBCA77ULL,         0x27D4EB2F165667C5ULL, 0x9E3779B1ULL,
};

// Word `at` of the secret that the seed makes.
__device__ static inline u64 secret_word(u32 at, u64 seed) { return SECRET[at] + (at & 1 ? 0 - seed : seed); }

// The 8 bytes of that secret from byte `at` on, which is no multiple of 8.
__device__ static inline u64 secret_bytes(u32 at, u64 seed) {
    u32 bits = at % 8 * 8;
    return secret_word(at / 8, seed) >> bits | secret_word(at / 8 + 1, seed) << (64 - bits);
}

// What one stripe adds to a lane: `data` is the lane's word, `other` its neighbour's.
__device__ static inline u64 mixed(u64 data, u64 other, u64 secret) {
    u64 key = data ^ secret;
    return other + (key & 0xFFFFFFFFULL) * (key >> 32);
}

__device__ static inline u64 word_of(const u8* bytes) {
    u64 word = 0;
    for (u32 at = 0; at < 8; at++) word |= (u64)bytes[at] << (8 * at);
    return word;
}

// The sum of `count` whole stripes in a lane. `place` is a multiple of 8.
__device__ static inline u64 sum_of(const u64* place, u32 count, u32 lane, u64 seed) {
    u64 sum = 0;
    for (u32 stripe = 0; stripe < count; stripe++) {
        const u64* words = place + stripe * LANES;
        sum += mixed(words[lane], words[lane ^ 1], secret_word(stripe + lane, seed));
    }
    return sum;
}

// given: [2, count]: addresses, multiples of 8; seeds. sums: [count, KiBs, lanes]. A thread for each KiB and lane in x,
// a block in y. The last KiB is not among them, also where it is a whole one.
extern "C" __global__ void xxh3_sums(const u64* given, u32 count, u64 size_bytes, u64* sums) {
    u64 kibs = (size_bytes - 1) / KIB;
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u32 block = blockIdx.y, lane = (u32)(at % LANES);
    if (at / LANES < kibs) {
        const u64* place = (const u64*)(given[block] + at / LANES * KIB);
        sums[block * kibs * LANES + at] = sum_of(place, STRIPES, lane, given[count + block]);
    }
}

// lanes: [count, lanes]; the checksum of block i ends in lanes[i, 0]. A thread for each lane of each block, those of a
// block side by side in one warp.
extern "C" __global__ void xxh3_chain(const u64* given, u32 count, u64 size_bytes, const u64* sums, u64* lanes) {
    u64 kibs = (size_bytes - 1) / KIB;
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u32 block = (u32)(at / LANES), lane = (u32)(at % LANES);
    u64* mine = lanes + (u64)block * LANES;
    u64 seed = 0;
    if (block < count) {
        seed = given[count + block];
        u64 secret = secret_word(STRIPES + lane, seed), sum = FIRST[lane];
        const u64* next = sums + block * kibs * LANES + lane;
        for (u64 kib = 0; kib < kibs; kib++) {
            sum += next[kib * LANES];
            sum = ((sum ^ (sum >> 47)) ^ secret) * PRIME32_1;
        }
        const u64* rest = (const u64*)(given[block] + kibs * KIB);
        sum += sum_of(rest, (u32)((size_bytes - 1 - kibs * KIB) / STRIPE_BYTES), lane, seed);
        const u8* last = (const u8*)given[block] + size_bytes - STRIPE_BYTES;
        sum += mixed(word_of(last + 8 * lane), word_of(last + 8 * (lane ^ 1)), secret_bytes(121 + 8 * lane, seed));
        mine[lane] = sum;
    }
    __syncwarp();
    if (block < count && lane == LANES - 1) {
        u64 hash = size_bytes * PRIME64_1;
        for (u32 pair = 0; pair < LANES; pair += 2) {
            u64 left = mine[pair] ^ secret_bytes(11 + 8 * pair, seed);
            u64 right = mine[pair + 1] ^ secret_bytes(19 + 8 * pair, seed);
            hash += left * right ^ __umul64hi(left, right);
        }
        hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9ULL;
        mine[0] = hash ^ (hash >> 32);
    }
}
