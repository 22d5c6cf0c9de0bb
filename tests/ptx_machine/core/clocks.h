// Who knows of what: vector clocks over everything that touches memory by itself.
//
// An agent is one kind of access of one warp, or one mbarrier on whose behalf TMA writes. A warp's
// ordinary accesses are stamped with its time; asynchronous ones with the number of the group (or
// barrier phase) whose completion ends them. An access (agent, time) happened before whoever has
// clock[agent] >= time.
#pragma once

#include <algorithm>
#include <iterator>
#include <vector>

#include "types.h"

namespace ptx {

// The kinds of access of a warp, each an agent of its own; kInit is mbarrier.init's write.
enum Kind { kRead, kWrite, kInit, kCopy, kProduct, kBulkRead, kBulkWrite, kKinds };

class Clock {
 public:
  u32 operator[](u32 agent) const { return agent < times_.size() ? times_[agent] : 0; }
  void raise(u32 agent, u32 time) {
    if (agent >= times_.size()) times_.resize(agent + 1);
    times_[agent] = std::max(times_[agent], time);
  }
  void join(const Clock& other) {
    if (other.times_.size() > times_.size()) times_.resize(other.times_.size());
    for (size_t i = 0; i < other.times_.size(); ++i) {
      times_[i] = std::max(times_[i], other.times_[i]);
    }
  }
  // Joins only the agents that `wanted` says.
  template <class Wanted>
  void join_if(const Clock& other, const Wanted& wanted) {
    if (other.times_.size() > times_.size()) times_.resize(other.times_.size());
    for (u32 i = 0; i < other.times_.size(); ++i) {
      if (wanted(i)) times_[i] = std::max(times_[i], other.times_[i]);
    }
  }
  void clear() { times_.clear(); }

 private:
  std::vector<u32> times_;
};

enum Space { kShared, kGlobal, kSpaces };

enum class Scope : u8 { kCta, kCluster, kGpu };
constexpr Scope kScopes[] = {Scope::kCta, Scope::kCluster, Scope::kGpu};  // each in the next

// The least scope that includes both CTAs.
inline Scope scope_of(u32 one, u32 other, u32 cluster) {
  if (one == other) return Scope::kCta;
  return one / cluster == other / cluster ? Scope::kCluster : Scope::kGpu;
}

// What has happened before, and what of it lies before a proxy fence on the way.
struct Knowledge {
  Clock happened;
  Clock fenced[kSpaces];

  void join(const Knowledge& other) {
    happened.join(other.happened);
    for (int space = 0; space < kSpaces; ++space) fenced[space].join(other.fenced[space]);
  }
  template <class Wanted>
  void join_if(const Knowledge& other, const Wanted& wanted) {
    happened.join_if(other.happened, wanted);
    for (int space = 0; space < kSpaces; ++space) {
      fenced[space].join_if(other.fenced[space], wanted);
    }
  }
  void clear() { *this = Knowledge(); }
};

class KnowledgeByScope {
 public:
  Knowledge& operator[](Scope scope) { return of_[static_cast<int>(scope)]; }

 private:
  Knowledge of_[std::size(kScopes)];
};

}  // namespace ptx
