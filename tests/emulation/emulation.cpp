// The scheduler of emulation.h: which thread runs next, and who waits for whom.
#include "emulation.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

// The limits of sm_80, the smallest GPU that the kernels are built for.
constexpr size_t kSharedBytes = 48 * 1024;  // without cudaFuncSetAttribute
constexpr size_t kMaxSharedBytes = 163 * 1024;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtWarp, kAtBlock, kExited };

void thread_main();

struct Thread {
  Fiber fiber{&thread_main};
  uint3 index;
  State state;
  const char* what;  // the operation that it waits in
  Where where;
  unsigned mask;
  WarpValue warp;
};

std::mutex one_launch;
std::deque<Thread> threads;  // those of a block, made once, used by every block of every launch
Fiber scheduler;
int current = 0;
const std::function<void()>* body = nullptr;
std::string failure;  // what a thread found wrong; the scheduler throws it
std::unique_ptr<unsigned char[]> dynamic;
std::map<const void*, size_t> allowed_shared;
std::minstd_rand random_order;
int64_t launches = 0, last_grid = 0;

void back_to_scheduler() { Fiber::switch_to(threads[current].fiber, scheduler); }

// A fiber's whole life: for each block, run the kernel once and wait for the next block.
void thread_main() {
  Fiber::entered(scheduler);
  for (;;) {
    (*body)();
    threads[current].state = State::kExited;
    back_to_scheduler();
  }
}

// Throw what is wrong. The fibers are left in the middle of a kernel, so they are given up.
[[noreturn]] void give_up(const std::string& message) {
  const std::runtime_error error("emulation: " + message);
  threads.clear();
  failure.clear();
  throw error;
}

// --- who waits for whom ------------------------------------------------------------------------

template <typename Index>
std::string text(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string describe(const Thread& thread) {
  return "thread " + text(thread.index) + " waits in " + thread.what + " at " +
         thread.where.file_name() + ":" + std::to_string(thread.where.line());
}

bool same_call(const Thread& a, const Thread& b) {
  return a.state == b.state && a.where.line() == b.where.line() &&
         std::strcmp(a.what, b.what) == 0 &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

// Let the lanes of a warp go on that wait in one call, with one mask, and whose mask names no lane
// that is still elsewhere.
void release_warp(int first, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    Thread& leader = threads[first + i];
    if (leader.state != State::kAtWarp) continue;
    unsigned group = 0;
    bool complete = true;
    for (int j = 0; j < lanes; ++j) {
      const Thread& other = threads[first + j];
      if ((leader.mask >> j & 1u) == 0 || other.state == State::kExited) continue;
      complete = complete && same_call(leader, other) && leader.mask == other.mask;
      group |= 1u << j;
    }
    if (!complete) continue;
    unsigned ballot = 0;
    for (int j = 0; j < lanes; ++j) {
      if ((group >> j & 1u) != 0 && threads[first + j].warp.value != 0) ballot |= 1u << j;
    }
    for (int j = 0; j < lanes; ++j) {
      Thread& lane = threads[first + j];
      if ((group >> j & 1u) == 0) continue;
      if ((group >> lane.warp.source & 1u) == 0) {
        give_up(describe(lane) + ": it reads lane " + std::to_string(lane.warp.source) +
                ", which does not exist, has exited or takes no part");
      }
      lane.warp.received = threads[first + lane.warp.source].warp.value;
      lane.warp.ballot = ballot;
      lane.state = State::kReady;
    }
  }
}

// Called when no thread can run: let them all go on from a barrier. False: all have exited.
bool release_block(int count) {
  const auto begin = threads.begin(), end = begin + count;
  const auto waits = [](const Thread& t) { return t.state != State::kExited; };
  const auto first = std::find_if(begin, end, waits);
  if (first == end) return false;
  const auto odd =
      std::find_if(first, end, [&](const Thread& t) { return waits(t) && !same_call(t, *first); });
  if (odd != end) give_up(describe(*first) + ", but " + describe(*odd));
  if (first->state == State::kAtWarp) give_up(describe(*first) + " for lanes that never come");
  for (auto thread = first; thread != end; ++thread) {
    if (waits(*thread)) thread->state = State::kReady;
  }
  return true;
}

// --- blocks ------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
void fill_static_shared(int) {}
#else
thread_local unsigned char in_shared_segment;

// Static __shared__ arrays are the only other thread-locals of this library, so they are filled
// by filling its thread-local segment.
void fill_static_shared(int garbage) {
  in_shared_segment = static_cast<unsigned char>(garbage);  // the segment exists from here on
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        unsigned char* const begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (const auto* header = info->dlpi_phdr; header < info->dlpi_phdr + info->dlpi_phnum;
             ++header) {
          if (header->p_type != PT_TLS || &in_shared_segment < begin ||
              &in_shared_segment >= begin + header->p_memsz) {
            continue;
          }
          memset(begin, in_shared_segment, header->p_memsz);
          return 1;
        }
        return 0;
      },
      nullptr);
}
#endif

void run_block(int count, size_t shared_bytes, int garbage) {
  memset(dynamic.get(), garbage, shared_bytes);
  fill_static_shared(garbage);
  for (int i = 0; i < count; ++i) threads[i].state = State::kReady;
  do {
    // Any warp may run any way ahead of the others; within one, the lanes come in any order.
    std::vector<int> warps((count + warpSize - 1) / warpSize);
    std::iota(warps.begin(), warps.end(), 0);
    while (!warps.empty()) {
      std::swap(warps[random_order() % warps.size()], warps.back());
      const int first = warps.back() * warpSize;
      const int lanes = std::min(warpSize, count - first);
      int order[warpSize];
      std::iota(order, order + lanes, first);
      std::shuffle(order, order + lanes, random_order);
      bool ran = false;
      for (int i = 0; i < lanes; ++i) {
        if (threads[order[i]].state != State::kReady) continue;
        current = order[i];
        threadIdx = threads[current].index;
        Fiber::switch_to(scheduler, threads[current].fiber);
        if (!failure.empty()) give_up(failure);
        ran = true;
      }
      if (ran) {
        release_warp(first, lanes);
      } else {
        warps.pop_back();
      }
    }
  } while (release_block(count));
}

void check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (count == 0 || count > kMaxThreads || block.z > 64) {
    give_up("a block of " + text(block) + " threads; it needs 1 to 1024, at most 64 along z");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 0xffff ||
      grid.z > 0xffff) {
    give_up("a grid of " + text(grid) + " blocks; it needs at least 1 along each axis, at most " +
            "2^31 - 1 along x, 65535 along y and z");
  }
  const auto allowed = allowed_shared.find(kernel);
  const size_t most = allowed == allowed_shared.end() ? kSharedBytes : allowed->second;
  if (shared_bytes > most) {
    give_up(std::to_string(shared_bytes) + " bytes of dynamic shared memory; this kernel may use " +
            std::to_string(most) + ", and cudaFuncSetAttribute raises that");
  }
}

}  // namespace

// --- what a thread of the grid calls ---------------------------------------------------------

int lane() { return current % warpSize; }

void meet_block(const char* what, Where where) {
  Thread& self = threads[current];
  self.what = what;
  self.where = where;
  self.state = State::kAtBlock;
  back_to_scheduler();
}

WarpValue meet_warp(const char* what, Where where, unsigned mask, uint64_t value, int source) {
  Thread& self = threads[current];
  self.what = what;
  self.where = where;
  self.mask = mask;
  self.warp = {.value = value, .source = source, .received = 0, .ballot = 0};
  self.state = State::kAtWarp;
  if ((mask >> lane() & 1u) == 0) failure = describe(self) + " with a mask that leaves it out";
  back_to_scheduler();
  return self.warp;
}

void* dynamic_shared() { return dynamic.get(); }

// --- what the host calls ---------------------------------------------------------------------

// For Python: the launches so far, those of a dry run included, and the last one's blocks.
extern "C" __attribute__((visibility("default"))) int64_t emulation_launches() { return launches; }
extern "C" __attribute__((visibility("default"))) int64_t emulation_last_grid() {
  return last_grid;
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxSharedBytes) {
    give_up("cudaFuncSetAttribute: " + std::to_string(bytes) +
            " bytes of shared memory are more than sm_80's " + std::to_string(kMaxSharedBytes));
  }
  allowed_shared[kernel] = bytes;
}

void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& thread) {
  const std::lock_guard lock(one_launch);
  check_launch(kernel, grid, block, shared_bytes);
  ++launches;
  last_grid = int64_t{grid.x} * grid.y * grid.z;
  if (std::getenv("SKINFAST_EMULATION_DRY") != nullptr) return;
  const char* text = std::getenv("SKINFAST_EMULATION_SEED");
  const unsigned seed = text == nullptr ? 0 : static_cast<unsigned>(std::atoi(text));
  random_order.seed(seed + 1);
  body = &thread;
  gridDim = grid;
  blockDim = block;
  // Of exactly this size on the heap, so that AddressSanitizer sees an access past its end.
  dynamic.reset(new unsigned char[shared_bytes]);

  const int count = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(threads.size()) < count) threads.emplace_back();
  for (int i = 0; i < count; ++i) {
    const unsigned linear = static_cast<unsigned>(i);
    threads[i].index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
  }
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  for (const uint64_t linear : blocks) {
    blockIdx = {static_cast<unsigned>(linear % grid.x),
                static_cast<unsigned>(linear / grid.x % grid.y),
                static_cast<unsigned>(linear / grid.x / grid.y)};
    run_block(count, shared_bytes, seed % 2 == 0 ? 0xff : 0x7b);
  }
}

}  // namespace emulation
