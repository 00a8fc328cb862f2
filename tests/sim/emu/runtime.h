// The emulator's machine: fibers as threads, warps that meet, resident blocks.
//
// One OS thread runs it all; a fiber runs until it waits, yields at an atomic or ends. Which fiber
// is next is the schedule's choice. Every block has its own heap objects, so that
// AddressSanitizer's redzones and ThreadSanitizer's history are those of one block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "sanitizer.h"

namespace fastattn::emu {

enum class Schedule { kForward, kReverse, kCyclic, kRandom };

struct Options {
  Schedule schedule = Schedule::kForward;
  uint32_t seed = 0;
  bool lazy = false;      // cp.async lands at the wait, not at its issue
  unsigned resident = 3;  // blocks at once (cooperative launches: all, up to max_cooperative)
  unsigned max_cooperative = 16;
  uint32_t poison = 0xffffffffu;    // what unwritten shared memory holds: NaN in every float type
  size_t shared_limit = 163 << 10;  // opt-in bytes a block; 163 KB is sm_80's
  size_t stack = 128 << 10;
};
extern Options options;

// --- fibers (fiber.cpp) --------------------------------------------------------------------------
struct Fiber {
  void* sp = nullptr;  // saved stack pointer, or ucontext_t
  Clock clock = nullptr;
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};
void fiber_prepare(Fiber& f, void (*entry)());
void fiber_switch(Fiber& from, Fiber& to, bool from_ends);
void fiber_entered();  // first statement of an entry

// --- threads, warps, blocks ----------------------------------------------------------------------
constexpr unsigned kLanes = 32;
enum class State : uint8_t { kReady, kYielded, kWarp, kBlock, kExited };
struct Warp;
struct Block;

struct Copy {
  unsigned char* dst;
  const unsigned char* src;  // null: zeros
  unsigned bytes;
};
// cp.async of one thread. `engine` is the clock of the copies: each happens after its issue and
// before the wait for its group, and is unordered with all that its thread does in between.
struct AsyncCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  uint64_t committed = 0;
  Clock engine = nullptr;
  char issue_edge = 0;
  char group_edges[64] = {};  // of group number % 64
};

// What fences and relaxed atomics have set aside, by scope: an atomic write after a fence releases
// what the fence saw, no more; a fence acquires what atomic reads before it saw.
struct FenceClocks {
  Clock released[2] = {}, seen[2] = {};
  char edge[4] = {};
};

struct Thread : Coordinates {
  Fiber fiber;
  Block* owner = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0, linear = 0;
  State state = State::kReady;
  const char* waits_at = "start";
  Site where;
  AsyncCopies copies;
  FenceClocks fences;
  std::string name() const;
};

enum class Meet : uint8_t { kSync, kShuffle, kVote, kMatch, kReduce, kLdmatrix, kMma };
const char* name_of(Meet m);

struct Meeting {
  uint32_t mask = 0, arrived = 0;
  uint64_t phase = 0;
  Meet kind = Meet::kSync;
  uint32_t detail = 0;
  Site site;
  const void* in[kLanes] = {};
  void* out[kLanes] = {};
  char edge[2] = {};  // by parity of the phase: nobody is two phases ahead
};

struct Warp {
  Block* owner = nullptr;
  unsigned index = 0;
  uint32_t live = 0, ready = 0, yielded = 0;
  std::deque<Meeting> meetings;  // one a mask; addresses stay
  Thread* lanes[kLanes] = {};
};

struct StaticObject {
  unsigned char* base;
  size_t bytes;
  Site site;
};

struct Block {
  uint3 index{};
  unsigned linear = 0, live = 0, waiting = 0;
  uint64_t phase = 0;
  Site barrier_site;
  int ands = 1, ors = 0, count = 0;  // of the phase under way
  int result[2][4] = {};             // by parity, by Vote
  char edge[2] = {};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::deque<StaticObject> statics;
  unsigned char* stacks = nullptr;
  size_t stacks_bytes = 0;
};

// --- scheduler (scheduler.cpp) -------------------------------------------------------------------
struct Grid {
  const char* name = "";
  const std::function<void()>* body = nullptr;
  dim3 grid, block;
  size_t shared = 0;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Warp*> warps;  // of resident blocks, in order
  Block* finished = nullptr;
  uint64_t progress = 0, progress_at_flip = 0;
  unsigned idle_rounds = 0;
  std::mt19937 rng;
  std::map<std::pair<uintptr_t, const Block*>, char*> edges;  // of atomics (order.cpp)
  std::deque<char> edge_bytes;
  Clock read_only = nullptr;  // reads of load_read_only
  char end_edge = 0;
};
extern Thread* self;
extern Grid* grid;
extern Fiber host;

// The calling thread waits until wake(); `why` is for reports.
void wait(State state, const char* why, Site site);
void wake(Thread& t);
void reschedule();  // the calling thread stays ready
void yield(const char* why, Site site);
void progressed();

// --- the CUDA runtime's part (cuda_runtime.cpp) --------------------------------------------------
cudaError_t launch_error(const void* kernel, dim3 g, dim3 b, size_t shared, bool cooperative);
cudaError_t set_error(cudaError_t e);

// --- pieces that the scheduler calls -------------------------------------------------------------
void warp_lane_exits(Thread& t);      // warp.cpp
void async_exit(Thread& t);           // async.cpp
void order_exit(Thread& t);           // order.cpp
void barrier_thread_exits(Block& b);  // barrier.cpp
void poison(unsigned char* p, size_t bytes);
unsigned char* shared_pointer(uint32_t address, unsigned bytes, const char* what, Site site);
[[noreturn]] void fault_stuck(bool spinning);  // fault.cpp
void describe_address(const void* p);
void register_region(const void* p, size_t bytes, const std::string& name);
void print_threads();

}  // namespace fastattn::emu
