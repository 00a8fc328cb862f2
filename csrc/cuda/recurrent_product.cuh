// The product of the recurrence: a slice of W_hh (backward: of its transpose), which a block keeps
// for the whole call, by the h (or gate gradients) of a tile of 8 or 16 sequences.
//
// W is operand A, 16 hidden units an m tile, so that a tile of 8 sequences wastes nothing. A chunk
// is 64 bytes of the columns: two k steps. Lane t of a row has the chunk's bytes 16t .. 16t + 15,
// of both operands, so a k step takes the chunk's columns in an order of its own and every load is
// of 16 bytes. Warps share the columns of a group of 16 units, chunk by chunk in turn, so that a
// block reads h once; the first kHeld chunks of a warp lie in registers as fragments, the others in
// shared memory as they are multiplied, without bank conflicts. The warps' sums meet in shared
// memory.
#pragma once

#include "mma.cuh"

namespace fastattn::cuda {

constexpr int kRecurrentWarps = 8, kRecurrentThreads = 32 * kRecurrentWarps;
constexpr int kUnitTile = 16;  // hidden units of a tile
constexpr int kChunkBytes = 64;
// Registers of fragments a thread holds. 65 536 registers of a multiprocessor are 256 a thread; the
// sums and two chunks of h want about 80.
#ifndef FASTATTN_RECURRENT_HELD  // tests, for few columns to go past it
#define FASTATTN_RECURRENT_HELD 96
#endif
constexpr int kHeldRegisters = FASTATTN_RECURRENT_HELD;

// kTiles: m tiles of 16 units, the forward's gates; backward: 1. kUnits: of a block.
template <typename T_, int kTiles_, int kUnits_>
struct Geometry {
  using T = T_;
  static constexpr int kTiles = kTiles_, kUnits = kUnits_;
  static constexpr int kVec = 16 / int(sizeof(T)), kChunk = kChunkBytes / int(sizeof(T));
  static constexpr int kSplit = kRecurrentWarps * kUnitTile / kUnits;  // warps that share columns
  static constexpr bool kAlone = kSplit == 1;  // the block has every unit: kBlock of recurrent.h
  static constexpr int kHeld = kHeldRegisters / (kAlone && sizeof(T) == 4 ? 12 : 8) / kTiles;
  // Sequences of a tile. 16 of fp32 would cost a third of the weights that registers hold.
  static constexpr int kN = kAlone || sizeof(T) == 4 ? 1 : 2, kBatch = 8 * kN;
  // Elements of a thread: kUnits are neighbours, then every kStep-th sequence.
  static constexpr int kRows = kRecurrentThreads / kUnits, kStep = kRows < kBatch ? kRows : kBatch;
  static constexpr int kCells = kBatch / kStep;
  // Sums of a warp: (tiles, sequences, units). 20: stores of fragments meet no bank conflict.
  static constexpr int kPartPitch = 20;
  static constexpr int kPart = kTiles * kBatch * kPartPitch;
  static constexpr int kPartBytes = kRecurrentWarps * kPart * 4;
  static constexpr int kPieceBytes = 32 * 16;                  // of 8 rows of a chunk
  static constexpr int kTileBytes = 2 * kTiles * kPieceBytes;  // of the units' rows of a chunk
};

// One lane's 16 bytes of h or of gate gradients. Shared memory, or what other blocks have written.
template <class G>
__device__ __forceinline__ uint4 load_chunk(const unsigned char* from) {
  if constexpr (G::kAlone) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    return ptx::ld_cg_16(from);
  }
}

// acc += w h of one chunk; w: the fragments of rows g and g + 8. Sums of fp32 are cut: see mma.cuh.
template <class G>
__device__ __forceinline__ void multiply_chunk(float (&acc)[G::kTiles][G::kN][4],
                                               const uint4 (&w)[G::kTiles][2],
                                               const uint4 (&h)[G::kN], bool both) {
  using T = typename G::T;
  constexpr bool kCut = sizeof(T) == 4;
  FragmentB<T> r_b[2][G::kN];
#pragma unroll
  for (int n = 0; n < G::kN; ++n) {
    r_b[0][n] = FragmentB<T>(h[n].x, h[n].y);
    r_b[1][n] = FragmentB<T>(h[n].z, h[n].w);
  }
#pragma unroll
  for (int i = 0; i < G::kTiles; ++i) {
    float part[G::kN][4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint4 &low = w[i][0], &high = w[i][1];
      uint32_t raw[4] = {step ? low.z : low.x, step ? high.z : high.x, step ? low.w : low.y,
                         step ? high.w : high.y};
      if constexpr (kCut)  // or halves of what is held would be made once, and spilled
#pragma unroll
        for (int k = 0; k < 4; ++k) raw[k] = uint32_t(fresh(int(raw[k])));
      const FragmentA<T> r_a(raw);
#pragma unroll
      for (int n = 0; n < G::kN; ++n) {
        if (n == 1 && !both) break;
        multiply<T>(kCut ? part[n] : acc[i][n], r_a, r_b[step][n]);
      }
    }
    if constexpr (kCut)
#pragma unroll
      for (int n = 0; n < G::kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][n][e] += part[n][e];
  }
}

// A warp's share of the slice.
template <class G>
struct ResidentWeights {
  using T = typename G::T;
  // Chunks of h under way at once.
  static constexpr int kAhead = sizeof(T) == 4 && G::kTiles == 4 ? 1 : G::kHeld < 4 ? G::kHeld : 4;
  uint4 held[G::kHeld][G::kTiles][2];
  unsigned char* s_rest;  // of the warp's units
  int chunks, part;

  // element(tile, row, column): of W, 0 where there is none. s_weights: of the block. units: that
  // the block has; a warp of none has no weights there, and multiplies nothing.
  template <class F>
  __device__ __forceinline__ ResidentWeights(unsigned char* s_weights, int all_chunks, int units,
                                             F element)
      : chunks(thread_id() / 32 / G::kSplit * kUnitTile < units ? all_chunks : 0) {
    const int warp = thread_id() / 32, g = lane_id() / 4, t = lane_id() % 4;
    part = warp % G::kSplit;
    const int rest = max(0, all_chunks - G::kSplit * G::kHeld);
    s_rest = s_weights + warp / G::kSplit * rest * G::kTileBytes + lane_id() * 16;
    const auto piece = [&](int tile, int half, int chunk) {
      T v[G::kVec];
#pragma unroll
      for (int e = 0; e < G::kVec; ++e)
        v[e] = element(tile, warp / G::kSplit * kUnitTile + 8 * half + g,
                       chunk * G::kChunk + t * G::kVec + e);
      uint4 out;
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
          words[w] = __float_as_uint(v[w]);
        } else {
          words[w] = pack(float(v[2 * w]), float(v[2 * w + 1]), T());
        }
      }
      out.x = words[0], out.y = words[1], out.z = words[2], out.w = words[3];
      return out;
    };
#pragma unroll
    for (int i = 0; i < G::kHeld; ++i)
#pragma unroll
      for (int tile = 0; tile < G::kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          held[i][tile][half] = piece(tile, half, part + i * G::kSplit);
    // A warp reads what it wrote itself, lane by lane.
#pragma unroll 1
    for (int chunk = part + G::kHeld * G::kSplit; chunk < chunks; chunk += G::kSplit)
#pragma unroll 1
      for (int i = 0; i < 2 * G::kTiles; ++i)
        *reinterpret_cast<uint4*>(at(chunk) + i * G::kPieceBytes) = piece(i / 2, i % 2, chunk);
  }

  __device__ __forceinline__ unsigned char* at(int chunk) const {
    return s_rest + (chunk - G::kSplit * G::kHeld) * G::kTileBytes;
  }

  // acc += W h for the rows h[0] (sequences 0 .. 7 of the tile) and, if both, h[1]: this lane's.
  __device__ __forceinline__ void multiply(float (&acc)[G::kTiles][G::kN][4],
                                           const unsigned char* const (&h)[G::kN],
                                           bool both) const {
#pragma unroll
    for (int first = 0; first < G::kHeld; first += kAhead) {
      uint4 r_h[kAhead][G::kN];
      fetch(r_h, h, both, part + first * G::kSplit);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (part + (first + i) * G::kSplit < chunks)
          multiply_chunk<G>(acc, held[first + i], r_h[i], both);
    }
#pragma unroll 1
    for (int first = part + G::kHeld * G::kSplit; first < chunks; first += kAhead * G::kSplit) {
      uint4 r_h[kAhead][G::kN];
      fetch(r_h, h, both, first);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int chunk = first + i * G::kSplit;
        if (chunk >= chunks) break;
        uint4 w[G::kTiles][2];
#pragma unroll
        for (int k = 0; k < 2 * G::kTiles; ++k)
          w[k / 2][k % 2] = *reinterpret_cast<const uint4*>(at(chunk) + k * G::kPieceBytes);
        multiply_chunk<G>(acc, w, r_h[i], both);
      }
    }
  }

 private:
  __device__ __forceinline__ void fetch(uint4 (&r_h)[kAhead][G::kN],
                                        const unsigned char* const (&h)[G::kN], bool both,
                                        int first) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int chunk = first + i * G::kSplit;
      if (chunk >= chunks) break;
      r_h[i][0] = load_chunk<G>(h[0] + chunk * kChunkBytes);
      if (G::kN > 1 && both) r_h[i][G::kN - 1] = load_chunk<G>(h[G::kN - 1] + chunk * kChunkBytes);
    }
  }
};

// A warp's sums to shared memory, and an element's sum over the warps that share its columns.
template <class G>
__device__ __forceinline__ void write_part(float* s_parts, const float (&acc)[G::kTiles][G::kN][4],
                                           bool both) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  float* const mine = s_parts + thread_id() / 32 * G::kPart;
#pragma unroll
  for (int i = 0; i < G::kTiles; ++i)
#pragma unroll
    for (int n = 0; n < G::kN; ++n) {
      if (n == 1 && !both) break;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        mine[(i * G::kBatch + 8 * n + 2 * t + e % 2) * G::kPartPitch + g + 8 * (e / 2)] =
            acc[i][n][e];
    }
}
template <class G>
__device__ __forceinline__ float whole_sum(const float* s_parts, int tile, int unit, int row) {
  const float* from = s_parts + unit / kUnitTile * G::kSplit * G::kPart;
  from += (tile * G::kBatch + row) * G::kPartPitch + unit % kUnitTile;
  float sum = from[0];
#pragma unroll
  for (int part = 1; part < G::kSplit; ++part) sum += from[part * G::kPart];
  return sum;
}

}  // namespace fastattn::cuda
