// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "runtime/engine.hpp"

namespace dtrain {

// What Python holds: the engine goes last, whatever order the garbage collector takes.
struct EngineGroup {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Group> group;
};

struct Pending {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Group> group;
  std::shared_ptr<Operation> operation;
};

// The classes Group and Operation.
void bind_group(nanobind::module_& m);

}  // namespace dtrain
