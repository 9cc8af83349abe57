// Random numbers that are a function of where they are used, not of what was drawn before:
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include "core/scalar.h"

namespace skinfast {

struct PhiloxWords {
  uint32_t values[4];
};

// The four words that belong to a counter under a key. Other counters, other words, in any order.
SKINFAST_HOST_DEVICE PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  constexpr uint32_t multipliers[] = {0xd2511f53u, 0xcd9e8d57u};
  constexpr uint32_t key_steps[] = {0x9e3779b9u, 0xbb67ae85u};
  constexpr int rounds = 10;
  uint32_t* const x = counter.values;
  uint32_t keys[] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < rounds; ++round) {
    const uint64_t first = static_cast<uint64_t>(multipliers[0]) * x[0];
    const uint64_t second = static_cast<uint64_t>(multipliers[1]) * x[2];
    x[0] = static_cast<uint32_t>(second >> 32) ^ x[1] ^ keys[0];
    x[1] = static_cast<uint32_t>(second);
    x[2] = static_cast<uint32_t>(first >> 32) ^ x[3] ^ keys[1];
    x[3] = static_cast<uint32_t>(first);
    keys[0] += key_steps[0];
    keys[1] += key_steps[1];
  }
  return counter;
}

// Of a word, a number in [-1, 1), from its upper 24 bits.
SKINFAST_HOST_DEVICE double symmetric_uniform(uint32_t word) {
  return static_cast<double>(word >> 8) * (1.0 / (1 << 23)) - 1.0;
}

}  // namespace skinfast
