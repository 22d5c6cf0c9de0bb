// A launch begins, its clusters come and go.
#include "machine.h"

namespace ptx {

Machine::Machine(const Program& program, const Launch& launch, std::vector<Allocation> memory,
                 std::vector<u8> parameters)
    : program(program),
      launch(launch),
      counts(program.code.size()),
      races(
          launch.grid[0] * launch.grid[1] * launch.grid[2] * ((launch.threads + 31) / 32) * kKinds,
          (launch.threads + 31) / 32, launch.cluster),
      memory_(std::move(memory)),
      parameter_bytes_(parameters.size() + 128),
      generator_(launch.seed) {
  parameters_ = parameter_bytes_.data() + (-reinterpret_cast<u64>(parameter_bytes_.data()) & 127);
  std::copy(parameters.begin(), parameters.end(), parameters_);
  for (const Instruction& instruction : program.code) races.lines.push_back(instruction.line);
  races.enabled = launch.adversarial;
  for (Allocation& a : memory_) {
    if (a.writable) a.cells.resize(a.bytes / kCell + 2);
  }
  const u32 ctas = launch.grid[0] * launch.grid[1] * launch.grid[2];
  if (launch.cluster == 0 || ctas % launch.cluster != 0)
    throw Failure("the grid is no multiple of the cluster");
  clusters_total_ = ctas / launch.cluster;
  agents_ = ctas * ((launch.threads + 31) / 32) * kKinds;
  registers_ = static_cast<int>(65536 / launch.threads) / 8 * 8;
  int most = 0;
  for (const Instruction& instruction : program.code) most = std::max(most, instruction.registers);
  if (most > 0) registers_ = std::min(registers_, most);
  static constexpr u32 kQuanta[] = {1, 6, 40};
  quantum_ = kQuanta[random(3)];
  laziness_ = launch.adversarial ? random(3) : 0;
}

// ------------------------------------------------------------------------------

void Machine::start_cluster() {
  auto cluster = std::make_unique<Cluster>();
  const u32 first = static_cast<u32>(clusters_.size()) * launch.cluster;
  const u32 warps = (launch.threads + 31) / 32;
  cluster->size = static_cast<int>(launch.cluster * warps);
  cluster->live = static_cast<int>(launch.cluster);
  for (u32 rank = 0; rank < launch.cluster; ++rank) {
    auto cta = std::make_unique<Cta>();
    const u32 id = first + rank, nx = launch.grid[0], ny = launch.grid[1];
    cta->id = id;
    cta->rank = rank;
    cta->index[0] = id % nx;
    cta->index[1] = id / nx % ny;
    cta->index[2] = id / nx / ny;
    cta->cluster = cluster.get();
    cta->shared.assign(launch.shared_bytes + 16, 0xFF);
    cta->cells.resize(launch.shared_bytes / kCell + 2);
    cta->warps.resize(warps);
    cta->live = static_cast<int>(warps);
    for (u32 i = 0; i < warps; ++i) {
      cta->warps[i].cta = cta.get();
      cta->warps[i].registers = registers_;
      start(*cta, cta->warps[i], i);
    }
    cluster->ctas.push_back(std::move(cta));
  }
  clusters_.push_back(std::move(cluster));
  ++active_;
  progress();
}

void Machine::start(Cta& cta, Warp& warp, u32 index) {
  warp.index = index;
  warp.id = cta.id * static_cast<u32>(cta.warps.size()) + index;
  warp.file = program.file;
  const u32 threads = std::min(32u, launch.threads - 32 * index);
  warp.alive = threads == 32 ? kAll : (1u << threads) - 1;
  warp.fragments = {{0, warp.alive}};
  warp.know_itself();
  for (const Slot slot : program.shared_addresses) {
    for (int lane = 0; lane < kLanes; ++lane) {
      warp.set(slot, lane, warp.value(slot, lane) + (u64{cta.rank} << kRankShift));
    }
  }
  const std::map<std::string, u32> uniform = {
      {"%ntid.x", launch.threads},
      {"%ntid.y", 1},
      {"%ntid.z", 1},
      {"%tid.y", 0},
      {"%tid.z", 0},
      {"%ctaid.x", cta.index[0]},
      {"%ctaid.y", cta.index[1]},
      {"%ctaid.z", cta.index[2]},
      {"%nctaid.x", launch.grid[0]},
      {"%nctaid.y", launch.grid[1]},
      {"%nctaid.z", launch.grid[2]},
      {"%cluster_ctarank", cta.rank},
      {"%cluster_nctarank", launch.cluster},
      {"%cluster_ctaid.x", cta.rank},
      {"%cluster_ctaid.y", 0},
      {"%cluster_ctaid.z", 0},
      {"%cluster_nctaid.x", launch.cluster},
      {"%cluster_nctaid.y", 1},
      {"%cluster_nctaid.z", 1},
      {"%clusterid.x", cta.index[0] / launch.cluster},
      {"%clusterid.y", cta.index[1]},
      {"%clusterid.z", cta.index[2]},
      {"%nclusterid.x", launch.grid[0] / launch.cluster},
      {"%nclusterid.y", launch.grid[1]},
      {"%nclusterid.z", launch.grid[2]},
      {"%warpid", index},
      {"%smid", cta.id},
      {"%nsmid", launch.resident * launch.cluster},
      {"%dynamic_smem_size", launch.shared_bytes},
      {"%total_smem_size", launch.shared_bytes},
      {"%clock64", static_cast<u32>(now_)},
      {"%clock", static_cast<u32>(now_)},
      {"%globaltimer", static_cast<u32>(now_)},
  };  // clang-format: keep
  for (const auto& [name, at] : program.specials) {
    for (int lane = 0; lane < kLanes; ++lane) {
      u32 value;
      if (name == "%tid.x") {
        value = 32 * index + static_cast<u32>(lane);
      } else if (name == "%laneid") {
        value = static_cast<u32>(lane);
      } else if (const auto found = uniform.find(name); found != uniform.end()) {
        value = found->second;
      } else {
        throw Failure("unknown special register " + name);
      }
      const bool wide = name == "%clock64" || name == "%globaltimer";
      warp.set({at, wide ? 8u : 4u}, lane, value);
    }
  }
  ready_.push_back(&warp);
}

void Machine::finish(Warp& warp) {
  Cta& cta = *warp.cta;
  const auto says = [&](const char* what) { races.found.insert(what); };
  if (!warp.products.empty()) says("a warp left with a product on its way");
  if (!warp.copies.empty()) says("a warp left with a cp.async on its way");
  for (BulkStore& store : warp.stores) {
    if (!store.read) says("a warp left while a TMA store still reads shared memory");
    advance(warp, store, true);
  }
  cta.left.join(warp.known.happened);
  warp.state = Warp::kGone;
  warp.file = {};
  warp.stores.clear();
  progress();
  leave_barriers(cta);
  if (--cta.live > 0) return;  // and what it has stored may still be on its way
  for (const auto& [agent, visit] : cta.visits) {
    if (cta.left[agent] >= visit.time) continue;
    races.found.insert("a CTA left that did not wait for the " +
                       races.describe(agent, visit.write, visit.pc));
  }
  Cluster& cluster = *cta.cluster;
  if (--cluster.live > 0) return;
  --active_;
  for (const auto& each : cluster.ctas) {
    each->shared = {};
    each->cells = {};
  }
}

}  // namespace ptx
