#include "pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace polydpo {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds stop_poll_interval{50};

struct Job {
    Job(std::size_t count, const std::function<void(std::size_t)>& body) : count(count), body(body) {}

    void work() {
        for (std::size_t index; (index = next.fetch_add(1)) < count;) body(index);
    }

    // The same on the thread that may be told to stop.
    void work(const std::function<bool()>& stop) {
        if (!stop) return work();
        auto asked = Clock::now();
        for (std::size_t index; (index = next.fetch_add(1)) < count;) {
            body(index);
            if (Clock::now() - asked < stop_poll_interval) continue;
            if (stop()) next.store(count);
            asked = Clock::now();
        }
    }

    const std::size_t count;
    const std::function<void(std::size_t)>& body;
    std::atomic<std::size_t> next{0};
    int helpers = 0;  // workers inside work(); guarded by the pool's mutex
};

class Pool {
public:
    void run(std::size_t count, int helpers, const std::function<void(std::size_t)>& body,
             const std::function<bool()>& stop) {
        Job job(count, body);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ensure_workers(helpers);
            queue_.insert(queue_.end(), helpers, &job);
        }
        work_available_.notify_all();
        job.work(stop);
        std::unique_lock<std::mutex> lock(mutex_);
        // Entries that no worker has taken would outlive the job: withdraw them.
        queue_.erase(std::remove(queue_.begin(), queue_.end(), &job), queue_.end());
        job_done_.wait(lock, [&job] { return job.helpers == 0; });
    }

private:
    // Workers are never joined: they sleep until there is work, and end with the process.
    void ensure_workers(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // The system gives no more threads: the calling one and those already here do the work.
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_available_.wait(lock, [this] { return !queue_.empty(); });
            Job* job = queue_.front();
            queue_.pop_front();
            ++job->helpers;
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->helpers == 0) job_done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable work_available_, job_done_;
    std::deque<Job*> queue_;
    int workers_ = 0;
};

// Never destroyed: workers may still be waiting on it when the process exits.
Pool* pool = nullptr;

// A forked child has the parent's pool without its threads, perhaps with a locked mutex: it gets a new one.
void make_pool() { pool = new Pool; }

std::atomic<GompParallel> team{nullptr};

Pool& shared_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        make_pool();
        pthread_atfork(nullptr, nullptr, make_pool);
    });
    return *pool;
}

}  // namespace

void parallel_for_openmp(std::size_t count, int threads, const std::function<void(std::size_t)>& body) {
    const GompParallel entry = team.load();
    const auto members = static_cast<unsigned>(std::min<std::size_t>(std::max(threads, 1), count));
    if (entry == nullptr || members < 2) return parallel_for(count, threads, body);
    Job job(count, body);
    entry([](void* data) { static_cast<Job*>(data)->work(); }, &job, members, 0);
}

void set_openmp(GompParallel entry) { team.store(entry); }

void parallel_for(std::size_t count, int threads, const std::function<void(std::size_t)>& body,
                  const std::function<bool()>& stop) {
    const auto helpers = static_cast<int>(std::min<std::size_t>(std::max(threads, 1), count)) - 1;
    if (helpers > 0) {
        shared_pool().run(count, helpers, body, stop);
    } else {
        Job(count, body).work(stop);
    }
}

}  // namespace polydpo
