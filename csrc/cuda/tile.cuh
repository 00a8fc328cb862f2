// Tiles in shared memory: rows of kCols elements, swizzled in 16-byte chunks, and the copies
// between them and global memory.
//
// ldmatrix reads one chunk of 8 rows at once; plain rows of 64 bytes or more would put those chunks
// into the same banks. A row's chunks are permuted by its index so that any 8 consecutive rows hit
// 8 different 16-byte banks. The same permutation keeps the 4-byte reads of a transposed fp32
// operand (rows 2t or 2t + 1, columns g) free of conflicts.
#pragma once

#include "ptx.cuh"

namespace fastattn::cuda {

template <typename T, int kCols>
struct Tile {
  static constexpr int kVec = 16 / int(sizeof(T));  // elements a chunk
  static constexpr int kChunks = kCols / kVec;      // chunks a row
  static constexpr int kRowBytes = kCols * int(sizeof(T));
  static_assert(kChunks % 4 == 0, "a row is a multiple of 64 bytes");

  // Byte offset of a chunk.
  __device__ static int chunk_at(int row, int chunk) {
    // Rows of an odd number of half lines: two rows make a line, and 4 chunks are permuted.
    const int swap = kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + (chunk ^ swap) * 16;
  }
  __device__ static int element_at(int row, int col) {
    return chunk_at(row, col / kVec) + (col % kVec) * int(sizeof(T));
  }
};

__host__ __device__ constexpr int power_of_2_below(int x) {
  return x < 2 ? 1 : 2 * power_of_2_below(x / 2);
}

// Where the rows of one head lie in global memory.
template <typename T>
struct Rows {
  T* base;           // row 0, column 0
  int64_t stride;    // between rows, elements
  int64_t stride_d;  // between columns
  int width;         // columns there are; those beyond read as 0
  bool vectors;      // 16-byte accesses are possible: aligned, unit stride, width % kVec == 0
};

// Rows [first, first + kRows) of `from` into a tile, zeros beyond `limit` rows and `width` columns:
// what lies there (NaN, the next sequence) never leaks, not even through 0 * NaN. In vectors the
// copy is asynchronous (the caller commits and waits), else it is done on return; either way other
// threads see it after a barrier.
template <typename T, int kCols, int kRows, int kThreads>
__device__ __forceinline__ void copy_in(unsigned char* s_tile, const Rows<const T>& from, int first,
                                        int limit) {
  using Layout = Tile<T, kCols>;
  const int thread = thread_id();
  if (from.vectors) {
    // A thread keeps its chunk and moves down by kStep rows: one pointer, one constant a step.
    constexpr int kStep = power_of_2_below(kThreads / Layout::kChunks);
    static_assert(kRows % kStep == 0);
    const int row = thread / Layout::kChunks, chunk = thread % Layout::kChunks;
    if (kThreads % (kStep * Layout::kChunks) != 0 && row >= kStep) return;
    const uint32_t to = ptx::shared_address(s_tile);
    const int left = chunk * Layout::kVec < from.width ? limit - first - row : 0;  // valid: at < it
    const T* src = from.base;
    if (left > 0) src += int64_t(first + row) * from.stride + chunk * Layout::kVec;
#pragma unroll
    for (int at = 0; at < kRows; at += kStep) {
      // An address that is not read stays at one that is.
      ptx::cp_async_16(to + uint32_t(Layout::chunk_at(row + at, chunk)), src, at < left);
      if (at + kStep < left) src += kStep * from.stride;
    }
  } else {
    for (int i = thread; i < kRows * kCols; i += kThreads) {
      const int row = i / kCols, col = i % kCols;
      T x = T(0.f);
      if (first + row < limit && col < from.width)
        x = from.base[int64_t(first + row) * from.stride + col * from.stride_d];
      *reinterpret_cast<T*>(s_tile + Layout::element_at(row, col)) = x;
    }
  }
}

// kRows rows of a tile, from its row `s_first` on, to rows [first, limit) of `to`, by one warp.
template <typename T, int kCols, int kRows>
__device__ __forceinline__ void copy_out(const unsigned char* s_tile, int s_first,
                                         const Rows<T>& to, int first, int limit) {
  using Layout = Tile<T, kCols>;
  const int lane = lane_id();
  if (to.vectors) {
    for (int i = lane; i < kRows * Layout::kChunks; i += 32) {
      const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
      if (first + row >= limit || chunk * Layout::kVec >= to.width) continue;
      const uint4 x =
          *reinterpret_cast<const uint4*>(s_tile + Layout::chunk_at(s_first + row, chunk));
      T* at = to.base + int64_t(first + row) * to.stride + chunk * Layout::kVec;
      *reinterpret_cast<uint4*>(at) = x;
    }
  } else {
    for (int i = lane; i < kRows * kCols; i += 32) {
      const int row = i / kCols, col = i % kCols;
      if (first + row >= limit || col >= to.width) continue;
      to.base[int64_t(first + row) * to.stride + col * to.stride_d] =
          *reinterpret_cast<const T*>(s_tile + Layout::element_at(s_first + row, col));
    }
  }
}

}  // namespace fastattn::cuda
