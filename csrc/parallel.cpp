#include "parallel.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lastrerank {
namespace {

class Pool {
 public:
  // Runs the job on `threads` threads, the caller included. The pool grows to the largest number ever asked for.
  void run(int threads, long tasks, const std::function<void(long)>& f) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int index = static_cast<int>(workers_.size());
        // A worker that starts now has not seen any job yet, the one about to be published included.
        workers_.emplace_back([this, index, seen = generation_] { work(index, seen); });
        workers_.back().detach();
      }
      job_ = &f;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = threads - 1;
      running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(f, tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

  std::mutex busy;  // held by the caller whose job the workers are on

 private:
  void work(int index, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= helpers_) continue;
      const std::function<void(long)>* job = job_;
      const long tasks = tasks_;
      lock.unlock();
      drain(*job, tasks);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void drain(const std::function<void(long)>& f, long tasks) {
    for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(long)>* job_ = nullptr;
  std::atomic<long> next_{0};
  long tasks_ = 0;
  int helpers_ = 0, running_ = 0;
  unsigned long generation_ = 0;
};

// One pool a process: after fork the parent's threads are gone, so the child makes its own. Pools are never destroyed,
// because detached workers may outlive static destruction.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (current == nullptr || owner != getpid()) {
    current = new Pool();
    owner = getpid();
  }
  return *current;
}

}  // namespace

void parallel_for(int threads, long tasks, const std::function<void(long)>& f) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1) {
    Pool& p = pool();
    std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      p.run(threads, tasks, f);
      return;
    }
  }
  for (long i = 0; i < tasks; ++i) f(i);
}

}  // namespace lastrerank
