// The machine: global memory, the clusters that run, and who moves next.
#pragma once

#include <functional>
#include <random>
#include <unordered_map>

#include "state.h"

namespace ptx {

// A tensor, or other memory that the program may touch.
struct Allocation {
  u64 base, bytes;
  bool writable;
  std::vector<Cell> cells;
};

struct Launch {
  u32 grid[3] = {1, 1, 1};
  u32 cluster = 1;
  u32 threads = 32;
  u32 shared_bytes = 0;
  u32 resident = 3;  // clusters at a time
  u32 seed = 0;
  bool adversarial = true;  // else no race is looked for, and counts depend on no chance
  u64 limit = 0;            // warp instructions
};

struct Counts {
  u64 executed = 0, lanes = 0;
  u64 sectors = 0, bytes = 0;                 // of global memory
  u64 wavefronts = 0, fewest_wavefronts = 0;  // of shared memory
};

constexpr u32 kSharedBase = 1024;  // what the system keeps of shared memory
constexpr u32 kRankShift = 24;     // where a shared address holds the rank of its CTA
constexpr u32 kOffset = (1u << kRankShift) - 1;
constexpr u64 kSharedWindow = u64{1} << 56;  // where generic addresses of shared memory begin

class Machine {
 public:
  Machine(const Program& program, const Launch& launch, std::vector<Allocation> memory,
          std::vector<u8> parameters);
  void run();

  const Program& program;
  const Launch launch;
  std::vector<Counts> counts;
  Races races;
  u64 instructions = 0;

  // --- What instructions are made of ---
  u32 random(u32 below) { return static_cast<u32>(generator_() % below); }
  [[noreturn]] void fail(const Warp& warp, const std::string& what) const;
  void report(const Warp& warp, const std::string& what);
  void tick(Warp& warp);
  // Something has moved that a loop of waiting does not move; it is news to those who poll global
  // memory.
  void progress() { last_progress_ = instructions; }
  void news();
  // Does not run `warp` before `wake` of that list, unless by chance.
  void sleep(Warp& warp, std::vector<Warp*>& list, std::string waits_for);
  void wake(std::vector<Warp*>& list);
  // A strong load or atomic saw `value`; seeing nothing new twice, the warp sleeps.
  void poll(Warp& warp, u64 address, u64 value);
  // Runs `land` later, or when nothing else can move.
  void later(std::function<void()> land);

  // --- Shared memory (shared.cpp): addresses carry the CTA's rank ---
  Cta& owner(Warp& warp, u32 address, bool cluster);
  u8* shared(Warp& warp, Cta& cta, u32 address, u32 bytes);
  u8* shared_raw(Cta& cta, u32 address, u32 bytes, u32 pc);
  void touch_shared(Cta& cta, u32 address, u64 bytes, const Access& access, const Knowledge& known);
  void visit(const Warp& warp, Cta& cta, const Access& access);  // `cta` may be another's
  void count_banks(Warp& warp, Mask lanes, const u32* addresses, u32 bytes);

  // --- Global memory (global.cpp) ---
  Allocation& allocation(const Warp& warp, u64 address, u64 bytes, bool write);
  void touch_global(const Warp& warp, u64 address, u64 bytes, const Access& access);
  void load(Cta& cta, u64 address, void* to, u32 bytes);  // weak or strong
  void store_weak(Cta& cta, u64 address, const void* from, u32 bytes, u32 agent, u32 time);
  void commit(Cta& cta, u64 address, u32 bytes);          // what is pending there
  void commit_known(Warp& warp, const Knowledge& known);  // a release does it
  void commit_some(Cta& cta);
  void count_global(Warp& warp, Mask lanes, const u64* addresses, u32 bytes);
  u8* parameters() { return parameters_; }

  // --- Synchronisation ---
  MBarrier& mbarrier(Warp& warp, Cta& cta, u32 address);
  void complete_if_done(MBarrier& barrier);
  u32 new_agent();
  // What strong stores and atomics tell those who read a word: by which CTA, within which scope.
  std::unordered_map<u64, std::map<u32, KnowledgeByScope>> published;

  // --- Asynchronous work ---
  void run_copy(Warp& warp, const Copy& copy);                 // cp_async.cpp
  void run_product(Warp& warp, Product& product);              // wgmma.cpp
  void advance(Warp& warp, BulkStore& store, bool to_memory);  // tma.cpp
  void release(CtaBarrier& barrier);                           // barriers.cpp
  void leave_barriers(Cta& cta);

 private:
  void start_cluster();
  void start(Cta& cta, Warp& warp, u32 index);
  void finish(Warp& warp);
  void slice(Warp& warp);
  void step(Warp& warp);
  void check_registers(Warp& warp, const Instruction& instruction);
  void choose_fragment(Warp& warp);
  void part(Warp& warp);
  bool gather(Warp& warp, const Instruction& instruction);
  void merge(Warp& warp);
  void branch(Warp& warp, const Instruction& instruction, Mask taken);
  bool move_something();
  void engines();
  u32 active() const { return active_; }
  [[noreturn]] void dead_end();
  std::string describe(const Warp& warp) const;

  struct Flight {
    u64 due;
    std::function<void()> land;
  };

  std::vector<Allocation> memory_;
  std::vector<u8> parameter_bytes_;
  u8* parameters_ = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<Warp*> ready_;
  std::vector<Flight> flights_;
  std::mt19937 generator_;
  u32 clusters_total_ = 0, active_ = 0, agents_ = 0;
  u32 quantum_ = 6, laziness_ = 0;
  // Per thread at the start: as many as fit, but no more than setmaxnreg ever asks for. The CTA's
  // pool is what it starts with.
  int registers_ = 0;
  u64 now_ = 0, news_ = 1, last_progress_ = 0, last_rouse_ = ~u64{0};
  std::vector<Warp*> pollers_;
};

}  // namespace ptx
