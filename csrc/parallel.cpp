#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lastrerank {
namespace {

// Waits actively for as long as waking a thread takes, and no longer: one job follows another within that time, and who
// shares the processor loses no more than that.
template <typename Condition>
void wait_actively(const Condition& condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return;
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (std::chrono::steady_clock::now() < until);
}

// While tasks run, numbers below 1.2e-38 are zero, in this thread: they change no score, and the processor is slow at them
// (sharp attention leaves many).
class TinyIsZero {
 public:
#if defined(__x86_64__)
  TinyIsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
  ~TinyIsZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  TinyIsZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | 1ull << 24));
  }
  ~TinyIsZero() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  unsigned long long before_;
#else
  TinyIsZero() {}
#endif
};

// The processors on which a job's threads began it. A thread that is woken beside a busy neighbour lands on its waker's,
// where one of the two stands still while the other works; it is to go elsewhere, and may go where it likes afterwards.
class Places {
 public:
#if defined(__linux__)
  void clear() { CPU_ZERO(&taken_); }
  void take() { CPU_SET(sched_getcpu(), &taken_); }
  bool taken() const { return CPU_ISSET(sched_getcpu(), &taken_); }

  void go_elsewhere() const {
    cpu_set_t allowed, free;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    CPU_XOR(&free, &allowed, &taken_);
    CPU_AND(&free, &free, &allowed);
    if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof free, &free) != 0) return;
    cpu_set_t now;  // another one, where somebody else has set it meanwhile: his stays
    if (sched_getaffinity(0, sizeof now, &now) == 0 && !CPU_EQUAL(&now, &free)) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
  }

 private:
  cpu_set_t taken_;
#else
  void clear() {}
  void take() {}
  bool taken() const { return false; }
  void go_elsewhere() const {}
#endif
};

class Pool {
 public:
  // Runs the job on at most `threads` threads, the caller included, and throws what a task has thrown. The pool grows to
  // the largest number ever asked for, or to what the system gives.
  void run(int threads, long tasks, const std::function<void(long)>& f) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(workers_.size()) < threads - 1) {
          const int index = static_cast<int>(workers_.size());
          workers_.reserve(workers_.size() + 1);
          // A worker that starts now has not seen any job yet, the one about to be published included.
          workers_.emplace_back([this, index, seen = generation_.load()] { work(index, seen); });
          workers_.back().detach();
        }
      } catch (...) {  // no thread to be had: those that are there do it
        threads = static_cast<int>(workers_.size()) + 1;
      }
      job_ = &f;
      tasks_ = tasks;
      error_ = nullptr;
      next_.store(0, std::memory_order_relaxed);
      helpers_ = threads - 1;
      places_.clear();
      places_.take();
      ++generation_;
    }
    wake_.notify_all();
    drain(f, tasks);
    // Who has not begun by now finds nothing to do and is not waited for: a neighbour may have his processor.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    lock.unlock();
    wait_actively([this] { return running_ == 0; });
    lock.lock();
    done_.wait(lock, [this] { return running_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  std::mutex busy;  // held by the caller whose job the workers are on

 private:
  void work(int index, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    bool worked = false;  // who had nothing to do in the last job sleeps
    for (;;) {
      if (worked) {
        lock.unlock();
        wait_actively([&] { return generation_ != seen; });
        lock.lock();
      }
      wake_.wait(lock, [&] { return generation_ != seen; });
      if (index < helpers_ && places_.taken()) {
        const Places places = places_;
        lock.unlock();
        places.go_elsewhere();
        lock.lock();
      }
      seen = generation_;
      worked = index < helpers_;
      const std::function<void(long)>* job = job_;
      if (!worked || job == nullptr) continue;
      const long tasks = tasks_;
      places_.take();
      ++running_;
      lock.unlock();
      drain(*job, tasks);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void drain(const std::function<void(long)>& f, long tasks) {
    const TinyIsZero zero;
    try {
      for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
    } catch (...) {
      next_.store(tasks, std::memory_order_relaxed);  // nobody begins another task
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(long)>* job_ = nullptr;  // none once no task is left to begin
  std::exception_ptr error_;
  std::atomic<long> next_{0};
  long tasks_ = 0;
  int helpers_ = 0;
  Places places_;
  // Changed under the lock alone; read without it by who waits actively.
  std::atomic<int> running_{0};
  std::atomic<unsigned long> generation_{0};
};

// One pool a process. After fork the parent's threads are gone and its locks may be held for ever, so the child makes its
// own. Pools are never destroyed, because detached workers may outlive static destruction.
Pool* current = nullptr;

Pool& pool() {
  static const bool registered = [] {
    current = new Pool();
    return pthread_atfork(nullptr, nullptr, [] { current = new Pool(); }) == 0;
  }();
  (void)registered;
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
  const TinyIsZero zero;
  for (long i = 0; i < tasks; ++i) f(i);
}

}  // namespace lastrerank
