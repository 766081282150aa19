// SPDX-License-Identifier: Apache-2.0
// A collective is a coroutine that waits for conditions; the engine resumes it when its condition holds. So one thread
// can drive the collectives of many groups, and an algorithm still reads from top to bottom.
#pragma once

#include <coroutine>
#include <exception>
#include <utility>

namespace dtrain {

class Task {
 public:
  struct promise_type {
    bool (*ready)(void* condition) = nullptr;  // both are null until the first wait
    void* condition = nullptr;
    std::exception_ptr error;

    Task get_return_object() { return Task(std::coroutine_handle<promise_type>::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { error = std::current_exception(); }
  };

  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Task() {
    if (handle_) handle_.destroy();
  }

  bool done() const { return handle_.done(); }

  bool is_ready() const {
    const promise_type& promise = handle_.promise();
    return promise.ready == nullptr || promise.ready(promise.condition);
  }

  // Runs until the next wait or the end; returns false at once if the condition waited for does not hold yet. Throws
  // what the coroutine throws.
  bool advance() {
    if (!is_ready()) return false;
    handle_.resume();
    const promise_type& promise = handle_.promise();
    if (promise.error) std::rethrow_exception(promise.error);
    return true;
  }

 private:
  explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}

  std::coroutine_handle<promise_type> handle_;
};

// Suspends until `condition()` is true, by `co_await` on a named Until. (It must be named: GCC before 13 may destroy a
// temporary in a co_await expression too early.)
template <class Condition>
class Until {
 public:
  explicit Until(Condition condition) : condition_(std::move(condition)) {}

  bool await_ready() { return condition_(); }
  void await_suspend(std::coroutine_handle<Task::promise_type> handle) {
    handle.promise().condition = this;
    handle.promise().ready = [](void* self) { return static_cast<Until*>(self)->condition_(); };
  }
  void await_resume() const {}

 private:
  Condition condition_;
};

}  // namespace dtrain
