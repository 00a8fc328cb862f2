// Which tier of the recurrence a call is served by, and its launches.
#include "recurrent_launch.cuh"

namespace fastattn::cuda {
namespace {

int64_t div_up(int64_t x, int64_t n) { return (x + n - 1) / n; }

RecurrentTable table_of(Cell cell) {
  return cell == Cell::kLstm ? lstm_kernels() : cell == Cell::kGru ? gru_kernels() : rnn_kernels();
}

const RecurrentVariant* find(const RecurrentParams& p, bool backward, int units) {
  const RecurrentTable table = table_of(p.cell);
  const RecurrentVariant* const all = backward ? table.backward : table.forward;
  for (int i = 0; i < table.count; ++i)
    if (all[i].dtype == p.dtype && all[i].head_dim == units) return all + i;
  return nullptr;
}

// What depends on the row of the product alone.
struct Row {
  int columns, chunks, pitch;

  Row(const RecurrentParams& p, bool backward)
      : columns(backward ? recurrent_gates(p.cell) * p.H : p.P),
        chunks(int(div_up(int64_t(columns) * (p.dtype == DType::kF32 ? 4 : 2), kChunkBytes))),
        // An odd number of half lines: eight rows' reads meet no bank conflict in shared memory.
        pitch((chunks | 1) * kChunkBytes) {}
};

// Bytes of shared memory of a block with that many units: parts, the exchange of a block that is
// alone, and the chunks of weights that its warps do not hold in registers (the header of
// recurrent_product.cuh): of a unit's tile, what is beyond warps * kHeld chunks.
int64_t shared_bytes(const RecurrentVariant& v, const RecurrentParams& p, bool backward) {
  const Row row(p, backward);
  const int tiles = backward ? 1 : recurrent_gates(p.cell);
  const bool alone = v.head_dim == kUnitsOfBlock;
  const int split = kRecurrentWarps * kUnitTile / v.head_dim;
  const int64_t unit_tiles = alone ? div_up(p.H, kUnitTile) : 1;
  const int64_t rest = row.chunks > split * v.keys ? row.chunks - split * v.keys : 0;
  return v.shared + unit_tiles * rest * tiles * 2 * 512 + (alone ? 2 * v.rows * row.pitch : 0);
}

Launch launch_all(const RecurrentParams& p, const RecurrentGrads& g, const RecurrentPlan& plan,
                  void* shared, void* carried, bool backward, cudaStream_t stream) {
  Launch out;
  const bool alone = plan.tier == RecurrentTier::kBlock;
  const RecurrentVariant* found = find(p, backward, alone ? kUnitsOfBlock : kUnitsOfGrid);
  out.kernel = found ? found->kernel : table_of(p.cell).forward->kernel;
  if (!found || plan.tier == RecurrentTier::kStep || p.P != p.H) {
    out.error = cudaErrorInvalidValue;
    return out;
  }
  RecurrentVariant v = *found;
  v.shared = plan.shared;
  const Row row(p, backward);
  RecurrentCall c;
  c.p = p, c.g = g;
  c.slices = plan.slices, c.rows = plan.rows, c.groups = plan.groups;
  c.columns = row.columns, c.chunks = row.chunks, c.pitch = row.pitch;
  c.barriers = static_cast<unsigned char*>(shared);
  c.exchange = c.barriers + int64_t(p.D) * plan.groups * kBarrierStride;
  c.h = static_cast<float*>(carried), c.c = c.h + int64_t(p.D) * p.B * p.H;
  if (!alone) {
    const RecurrentScratch scratch = recurrent_scratch(p, backward, plan);
    out.error = cudaMemsetAsync(shared, 0, size_t(scratch.shared), stream);
    if (out.error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it again
      return out;
    }
  }
  for (int d = 0; d < p.D && out.error == cudaSuccess; d += plan.directions) {
    c.first = d;
    const int64_t blocks = int64_t(plan.slices) * plan.groups * plan.directions;
    if (alone) {
      launch(out, v, blocks, stream, c);
    } else {
      launch_together(out, v, blocks, stream, c);
    }
  }
  return out;
}

}  // namespace

// kBlock: every unit has a warp's tile, and what is not in registers fits a block: H <= 128; of an
// LSTM in fp32 96 where a block has 163 KB of shared memory, 128 where it has 227. kGrid: a block
// per 16 units, all resident at once. An LSTM's kernel takes every register of a multiprocessor, so
// H <= 16 x multiprocessors: 1728 of 108, 2112 of 132. And shared memory holds the columns that
// registers do not, of the LSTM's forward in 16 bit (P - 768) x 128 bytes beside 40 KB of parts
// (99 KB: P <= 1216), in fp32 (P - 384) x 256 bytes beside 20 (163 KB: P <= 944, 227 KB: 1200).
// A projection is kStep: its second product would be a second barrier.
RecurrentPlan recurrent_plan(const RecurrentParams& p, bool backward, const RecurrentRoom& room,
                             RecurrentTier from) {
  RecurrentPlan plan;
  if (p.P != p.H || from == RecurrentTier::kStep) return plan;
  const RecurrentVariant* const alone = find(p, backward, kUnitsOfBlock);
  if (alone && from == RecurrentTier::kBlock && p.H <= kUnitsOfBlock &&
      shared_bytes(*alone, p, backward) <= room.shared) {
    plan.tier = RecurrentTier::kBlock;
    plan.directions = p.D;
    plan.rows = alone->rows;
    plan.groups = int(div_up(p.B, plan.rows));
    plan.shared = int(shared_bytes(*alone, p, backward));
    return plan;
  }
  const RecurrentVariant* const grid = find(p, backward, kUnitsOfGrid);
  const int64_t slices = div_up(p.H, kUnitsOfGrid);
  const int64_t blocks = int64_t(room.multiprocessors) * room.resident;
  if (!grid || slices > blocks || shared_bytes(*grid, p, backward) > room.shared) return plan;
  plan.tier = RecurrentTier::kGrid;
  plan.slices = int(slices);
  plan.directions = p.D * slices <= blocks ? p.D : 1;
  const int64_t most = blocks / (slices * plan.directions);
  plan.rows = int(div_up(div_up(p.B, most), 8) * 8);
  plan.groups = int(div_up(p.B, plan.rows));
  plan.shared = int(shared_bytes(*grid, p, backward));
  return plan;
}

cudaError_t recurrent_room(const RecurrentParams& p, bool backward, RecurrentRoom& room) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto then = [&](auto call) {
    if (error == cudaSuccess) error = call();
  };
  then([&] {
    return cudaDeviceGetAttribute(&room.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  });
  then([&] {
    return cudaDeviceGetAttribute(&room.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  });
  room.resident = 0;
  const RecurrentVariant* const v = find(p, backward, kUnitsOfGrid);
  const int64_t bytes = v ? shared_bytes(*v, p, backward) : 0;
  if (v && bytes <= room.shared) {
    const auto* const function = reinterpret_cast<const void*>(v->function);
    then([&] {
      return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(bytes));
    });
    then([&] {
      return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room.resident, function, v->threads,
                                                           size_t(bytes));
    });
  }
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
  return error;
}

RecurrentScratch recurrent_scratch(const RecurrentParams& p, bool backward,
                                   const RecurrentPlan& plan) {
  RecurrentScratch out;
  const int64_t state = int64_t(p.D) * p.B * p.H * 4;
  out.carried = p.cell == Cell::kLstm ? 2 * state : state;
  if (plan.tier == RecurrentTier::kGrid)
    out.shared = int64_t(p.D) * plan.groups * kBarrierStride +
                 2 * int64_t(p.D) * p.B * Row(p, backward).pitch;
  return out;
}

Launch recurrent_forward(const RecurrentParams& p, const RecurrentPlan& plan, void* shared,
                         void* carried, cudaStream_t stream) {
  return launch_all(p, {}, plan, shared, carried, false, stream);
}
Launch recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                          const RecurrentPlan& plan, void* shared, void* carried,
                          cudaStream_t stream) {
  return launch_all(p, g, plan, shared, carried, true, stream);
}

int recurrent_variants(VariantInfo* out, int capacity) {
  int n = 0;
  for (const Cell cell : {Cell::kLstm, Cell::kGru, Cell::kRnnTanh}) {
    const RecurrentTable table = table_of(cell);
    for (const RecurrentVariant* all : {table.forward, table.backward})
      for (int i = 0; i < table.count; ++i, ++n)
        if (n < capacity) out[n] = all[i];
  }
  return n;
}

}  // namespace fastattn::cuda
