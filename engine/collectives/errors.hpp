// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

namespace dtrain {

// Ranks call different collectives at the same place in a group's sequence.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A rank has left the group while others wait for it.
struct RankLeft : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace dtrain
