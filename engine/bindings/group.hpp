// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "runtime/engine.hpp"

namespace dtrain {

// Objects that Python holds. Each keeps the engine alive, which is destroyed last, in whatever order the garbage
// collector destroys them.
struct EngineGroup {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Group> group;
};

struct Pending {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Group> group;
  std::shared_ptr<Operation> operation;
};

// Adds the classes Group and Operation to the module.
void bind_group(nanobind::module_& m);

}  // namespace dtrain
