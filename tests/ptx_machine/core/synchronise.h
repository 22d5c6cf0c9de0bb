// How knowledge passes through words of global memory: release and acquire, alone or by fences.
#pragma once

#include "machine.h"

namespace ptx {

// A load of `order` at `address` gets to know what stores to it have told.
void hear(Machine& m, Warp& warp, u64 address, Order order, Scope scope);
// A strong store (or atomic, which `adds` to what others told) at `address` tells what it may.
void tell(Machine& m, Warp& warp, u64 address, Order order, Scope scope, bool adds);
// What happened before a release becomes visible to others.
void before_release(Machine& m, Warp& warp, Scope scope);

}  // namespace ptx
