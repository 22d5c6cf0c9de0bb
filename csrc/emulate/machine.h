// A small model of the parts of a Hopper GPU that the kernels rely on, to run them on a CPU.
//
// Every CUDA thread is a fiber; a seeded scheduler interleaves fibers, CTAs and the asynchronous
// engines. The model is adversarial where the hardware is merely free:
// - TMA copies and tensor-core products happen at random times between their start and the wait for
//   them; a TMA store first reads shared memory, later writes global memory;
// - shared memory has two views: ordinary stores reach the asynchronous one (TMA, wgmma) only
//   through this thread's fence.proxy.async;
// - a flag that was read relaxed allows no TMA load before an acquire and a global proxy fence;
// - clusters start at random times, and at most `resident` at a time.
// Rules broken beyond doubt (a dead end, a surplus arrival, shared memory given up while a store
// still reads it) raise an error. What is not modelled: time, caches,
// register limits, and the scopes of barriers (a cluster's are taken to be right).
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace lora {

struct TensorMap {  // a row-major matrix in boxes 128 bytes wide, 128-byte swizzle
  uint8_t* data;
  int64_t rows, columns, pitch_bytes;
  int element_bytes, box_rows;
};

namespace emulate {

constexpr uint32_t kSharedStart = 512;  // not a multiple of 1024: the kernel must align it itself
constexpr uint32_t kSharedBytes = 227 * 1024;

struct Options {
  int seed = 0, clusters = 3, resident = 3;
  std::string fault;  // one primitive that misbehaves, see `faulty`
};

struct Thread;
using Waiters = std::vector<Thread*>;

struct Barrier {
  int expected = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
  Waiters waiters;
};

struct Meeting {  // of a fixed number of threads: bar.sync and the warp's collectives
  int arrived = 0, generation = 0;
  uint32_t values[2][32] = {};
  Waiters waiters;
};

struct Product {  // one warp's 16 rows of a wgmma
  uint64_t a, b;
  int n;
  bool mn_a, mn_b;
  float (*unpack)(uint16_t);
  float* accumulators[32];
  int arrived = 0;
};

struct Warp {  // as far as it multiplies: nothing says that the warps of a warpgroup keep step

  std::deque<Product> products;
  size_t done = 0;
  Waiters waiters;
};

struct Cta {
  int rank = 0, unfinished = 0;
  std::vector<Cta*> cluster;
  std::vector<uint8_t> ordinary, async;  // the two views of shared memory
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  Warp warps[12];
  Cta() : ordinary(kSharedBytes, 0xFF), async(kSharedBytes, 0xFF) {}  // all NaN
};

struct Task {  // of an asynchronous engine
  std::function<void()> steps[2];
  int next = 0, count = 0;
  int64_t due = 0;  // the step of the scheduler before which it is not done, unless waited for
  void advance(int to) {
    for (; next < to; ++next) steps[next]();
  }
};
using Store = std::shared_ptr<Task>;  // step 0 reads shared memory, step 1 writes global memory

struct Thread {
  Cta* cta;
  int index;
  std::function<void()> body;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // ordinary writes: address, bytes
  bool needs_acquire = false, needs_proxy_fence = false, may_multiply = false;
  size_t products = 0;
  std::vector<size_t> product_groups;  // products before each commit that is not waited for
  std::vector<Store> open_stores;
  std::deque<std::vector<Store>> store_groups;
};

class Machine {
 public:
  static Options& options() {
    static Options options;
    return options;
  }
  static Machine& get() { return *current(); }
  static Thread& thread() { return *get().running_; }
  static Cta& cta() { return *thread().cta; }
  static bool faulty(const char* fault) { return options().fault == fault; }

  int blocks() const { return static_cast<int>(ctas_.size()); }
  uint32_t random(uint32_t below) { return random_() % below; }

  // Runs `kernel` in every thread of `clusters` clusters of `ctas` CTAs to the end.
  static void run(int clusters, int ctas, int threads, const std::function<void()>& kernel) {
    Machine machine;
    current() = &machine;
    machine.random_.seed(options().seed);
    for (int i = 0; i < clusters * ctas; ++i) {
      machine.ctas_.push_back(std::make_unique<Cta>());
      machine.ctas_.back()->rank = i % ctas;
      machine.ctas_.back()->unfinished = threads;
    }
    for (int i = 0; i < clusters * ctas; ++i) {
      for (int j = 0; j < ctas; ++j) {
        machine.ctas_[i]->cluster.push_back(machine.ctas_[i / ctas * ctas + j].get());
      }
    }
    machine.loop(ctas, threads, kernel);
    current() = nullptr;
    if (!machine.error_.empty()) throw std::runtime_error(machine.error_);
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = what;
    setcontext(&scheduler_);
    std::abort();
  }
  static void require(bool condition, const char* what) {
    if (!condition) get().fail(what);
  }

  // Lets others run; the thread stays ready.
  void yield() {
    ready_.push_back(running_);
    swapcontext(&running_->context, &scheduler_);
  }
  // Now and then lets this thread fall behind the others by a good deal.
  void stall() {
    if (random(4) == 0) {
      for (uint32_t i = random(2000); i > 0; --i) yield();
    }
  }
  template <class Condition>
  void wait(Waiters& waiters, const Condition& condition) {
    while (!condition()) {
      waiters.push_back(running_);
      swapcontext(&running_->context, &scheduler_);
    }
  }
  void wake(Waiters& waiters) {
    spins_ = 0;
    ready_.insert(ready_.end(), waiters.begin(), waiters.end());
    waiters.clear();
  }
  void spin() {
    if (++spins_ > 1000000) fail("dead end: threads spin and nothing else happens");
    yield();
  }

  Store start(std::function<void()> first, std::function<void()> second = nullptr) {
    auto task = std::make_shared<Task>();
    task->steps[0] = std::move(first);
    task->steps[1] = std::move(second);
    task->count = task->steps[1] ? 2 : 1;
    task->due = lag();
    tasks_.push_back(task);
    return task;
  }

  void meet(int id, int threads, uint32_t* exchanged = nullptr) {
    meet(cta(), id, threads, exchanged);
  }
  void meet(Cta& where, int id, int threads, uint32_t* exchanged = nullptr) {
    Meeting& meeting = where.meetings[id];
    const int generation = meeting.generation;
    uint32_t* values = meeting.values[generation % 2];
    if (exchanged != nullptr) values[thread().index % 32] = *exchanged;
    if (++meeting.arrived == threads) {
      meeting.arrived = 0;
      ++meeting.generation;
      wake(meeting.waiters);
    } else {
      wait(meeting.waiters, [&] { return meeting.generation != generation; });
    }
    if (exchanged != nullptr) std::memcpy(exchanged, values, sizeof meeting.values[0]);
  }

 private:
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  static void enter() {
    thread().body();
    Machine& machine = get();
    for (const auto& group : thread().store_groups) {
      for (const Store& store : group) {
        require(store->next > 0, "shared memory given up while a TMA store reads it");
      }
    }
    require(thread().open_stores.empty(), "a TMA store was never committed");
    --cta().unfinished;
    machine.spins_ = 0;
    setcontext(&machine.scheduler_);
  }

  // Most tasks are done soon, some very late: both are where protocols break.
  int64_t lag() { return now_ + random(random(4) == 0 ? 50000 : 200); }

  void admit(int ctas, int threads, const std::function<void()>& kernel) {
    int active = 0;
    for (int i = 0; i < started_; ++i) active += ctas_[i]->unfinished > 0;
    if (started_ == blocks() || active >= options().resident * ctas) return;
    if (active > 0 && random(2000) != 0) return;
    for (int i = 0; i < ctas; ++i) start(ctas_[started_++].get(), threads, kernel);
  }

  [[gnu::noinline]] static void prepare(Thread& thread) {
    constexpr size_t kStack = 1 << 16;
    thread.stack = std::make_unique_for_overwrite<char[]>(kStack);
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, kStack};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Machine::enter, 0);
  }

  void start(Cta* cta, int threads, const std::function<void()>& kernel) {
    for (int i = 0; i < threads; ++i) {
      auto thread = std::make_unique<Thread>();
      thread->cta = cta;
      thread->index = i;
      thread->body = kernel;
      prepare(*thread);
      ready_.push_back(thread.get());
      threads_.push_back(std::move(thread));
    }
  }

  void loop(int ctas, int threads, const std::function<void()>& kernel) {
    while (error_.empty()) {
      admit(ctas, threads, kernel);
      ++now_;
      const size_t candidate = tasks_.empty() ? 0 : random(static_cast<uint32_t>(tasks_.size()));
      if (!tasks_.empty() && (ready_.empty() || tasks_[candidate]->due <= now_)) {
        Task& task = *tasks_[candidate];
        if (task.next < task.count) task.advance(task.next + 1);
        task.due = lag();
        spins_ = 0;
        if (task.next == task.count) {
          tasks_[candidate] = tasks_.back();
          tasks_.pop_back();
        }
      } else if (!ready_.empty()) {
        const size_t i = random(static_cast<uint32_t>(ready_.size()));
        running_ = ready_[i];
        ready_[i] = ready_.back();
        ready_.pop_back();
        // A thread that ends or fails returns by setcontext, any other by swapcontext.
        swapcontext(&scheduler_, &running_->context);
      } else {
        break;
      }
    }
    for (const auto& cta : ctas_) {
      if (error_.empty() && cta->unfinished > 0) error_ = "dead end: every thread waits";
    }
  }

  std::mt19937 random_;
  std::vector<std::unique_ptr<Cta>> ctas_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> ready_;
  std::vector<Store> tasks_;
  int started_ = 0, spins_ = 0;
  int64_t now_ = 0;
  Thread* running_ = nullptr;
  ucontext_t scheduler_;
  std::string error_;
};

}  // namespace emulate
}  // namespace lora
