// SPDX-License-Identifier: Apache-2.0
// Parts of the engine that are given any bytes: by libFuzzer, and in tests the inputs that it has kept. None of them
// needs MPI.
#pragma once

#include <cstddef>
#include <span>

namespace dtrain::fuzz {

// Each function does with the bytes what the engine does with them. A sanitizer's finding, or an exception, is a bug.
//
// A message from a rank of another node.

// A message from a rank of another node.
void control(std::span<const std::byte> bytes);
// The content of the pages that another rank of this node shares.
void pages(std::span<const std::byte> bytes);
// Files of /proc and of control groups, texts of versions, the beginning of a long message.
void texts(std::span<const std::byte> bytes);

}  // namespace dtrain::fuzz
