// A small thread pool: `parallel_for(threads, tasks, f)` runs f(task) for tasks 0 .. tasks - 1, handed out in order.
//
// Its own rather than OpenMP's: a second OpenMP runtime beside PyTorch's would keep a second set of spinning threads,
// and GNU's can't be used in a child after fork. Workers here sleep between jobs, after the tenth of a millisecond in
// which the next one mostly comes; a forked child starts its own pool; a caller that finds the pool busy (another Python
// thread is in it) runs its tasks by itself. So that a busy neighbour takes no more than his share, a thread that has not
// begun when no task is left is not waited for, and one that is woken on its waker's processor goes elsewhere. What a task
// throws, the call throws once no thread is in a task any more.
#pragma once

#include <functional>

namespace lastrerank {

void parallel_for(int threads, long tasks, const std::function<void(long)>& f);

}  // namespace lastrerank
