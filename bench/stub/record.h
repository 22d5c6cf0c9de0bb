// What the stub driver and the stub runtime remember of every launch, for Python to read.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { kLaunches = 64, kParameterBytes = 4096 };

typedef struct {
  char kernel[128];
  uint64_t function;  // which compiled kernel of that name
  uint32_t grid[3], block[3], cluster[3];
  uint32_t shared_bytes;
  uint64_t stream;
  uint32_t parameter_bytes;  // of `parameters`, laid out as the kernel reads them
  uint8_t parameters[kParameterBytes];
} Launch;

// A tensor map in its 128 bytes, as far as tests ask.
typedef struct {
  uint64_t address, sizes[2], pitch_bytes;
  uint32_t box[2], rank, type, swizzle, zero;
} Map;

typedef struct {
  uint64_t launches, maps, pointer_queries, modules;
  Launch last[kLaunches];  // launch i is at i % kLaunches
} Record;

extern Record stub_record;

// Returns the place of a new launch, zeroed; several threads may launch at once.
static inline Launch* stub_new_launch(void) {
  const uint64_t i = __atomic_fetch_add(&stub_record.launches, 1, __ATOMIC_RELAXED);
  Launch* launch = &stub_record.last[i % kLaunches];
  memset(launch, 0, offsetof(Launch, parameters));
  launch->cluster[0] = launch->cluster[1] = launch->cluster[2] = 1;
  return launch;
}
