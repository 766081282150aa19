// SPDX-License-Identifier: Apache-2.0
// A small test framework. A Test at namespace scope registers itself; main.cpp runs it in its own process, or, if the
// test says so, on 1, 2, 3 and 4 MPI ranks. Expectations that fail are counted and the test continues, so that ranks
// stay in step.
#pragma once

#include <functional>
#include <source_location>
#include <sstream>
#include <string>
#include <vector>

namespace dtrain::test {

enum class Runs { alone, on_ranks };

struct Test {
  Test(std::string test_name, Runs runs, std::function<void()> test_body);

  std::string name;
  Runs where;
  std::function<void()> body;
};

void fail(const std::string& what, std::source_location where = std::source_location::current());
int num_failures();

inline void expect(bool holds, const std::string& what, std::source_location where = std::source_location::current()) {
  if (!holds) fail(what, where);
}

template <class A, class B>
void expect_equal(const A& found, const B& wanted, const std::string& what,
                  std::source_location where = std::source_location::current()) {
  if (found == wanted) return;
  std::ostringstream text;
  text << what << ": found " << found << ", wanted " << wanted;
  fail(text.str(), where);
}

// Expects `call` to throw an Error whose text contains `part`.
template <class Error, class Call>
void expect_throws(const Call& call, const std::string& part,
                   std::source_location where = std::source_location::current()) {
  try {
    call();
  } catch (const Error& error) {
    const std::string text = error.what();
    if (text.find(part) == std::string::npos) fail("the error is \"" + text + "\", without \"" + part + "\"", where);
    return;
  } catch (const std::exception& error) {
    return fail(std::string("an error of another type: ") + error.what(), where);
  }
  fail("no error, wanted \"" + part + "\"", where);
}

// Reports that this machine cannot run the rest of a test.
void skip(const std::string& why);

// Runs `body` in a forked child; a failure there is a failure here.
void in_child(const std::function<void()>& body, std::source_location where = std::source_location::current());

}  // namespace dtrain::test
