// SPDX-License-Identifier: Apache-2.0
// Tests with the inputs that the fuzzers have kept, each given once more to its target. The sanitizers report errors.
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <utility>
#include <vector>

#include "fuzz/targets.hpp"
#include "test.hpp"

namespace dtrain {
namespace {

using namespace test;

const Test corpus("corpus: inputs that the fuzzers have kept", Runs::alone, [] {
  const std::vector<std::pair<std::string, std::function<void(std::span<const std::byte>)>>> targets{
      {"control", fuzz::control}, {"pages", fuzz::pages}, {"texts", fuzz::texts}};
  for (const auto& [name, target] : targets) {
    int num_inputs = 0;
    for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(CORPUS) / name)) {
      std::ifstream file(entry.path(), std::ios::binary);
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      target(std::as_bytes(std::span(bytes)));
      ++num_inputs;
    }
    expect(num_inputs > 5, "there are inputs for " + name);
  }
});

}  // namespace
}  // namespace dtrain
