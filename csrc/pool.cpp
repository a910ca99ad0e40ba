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
constexpr std::chrono::milliseconds between_questions{50};

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
            if (Clock::now() - asked < between_questions) continue;
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
            hire(helpers);
            invitations_.insert(invitations_.end(), helpers, &job);
        }
        invited_.notify_all();
        job.work(stop);
        std::unique_lock<std::mutex> lock(mutex_);
        // Invitations that nobody has taken would outlive the job: withdraw them.
        invitations_.erase(std::remove(invitations_.begin(), invitations_.end(), &job), invitations_.end());
        left_.wait(lock, [&job] { return job.helpers == 0; });
    }

private:
    // Workers are never stopped: they sleep until there is work, and the process ends under them.
    void hire(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // The system gives no more threads: the calling one and those already here do the work.
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            invited_.wait(lock, [this] { return !invitations_.empty(); });
            Job* job = invitations_.front();
            invitations_.pop_front();
            ++job->helpers;
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->helpers == 0) left_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable invited_, left_;
    std::deque<Job*> invitations_;
    int workers_ = 0;
};

// Never destroyed: workers may still be waiting on it when the process exits.
Pool* pool = nullptr;

// A forked child has the parent's pool without its threads, perhaps with a locked mutex: it gets a new one.
void renew() { pool = new Pool; }

std::atomic<GompParallel> team{nullptr};

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        renew();
        pthread_atfork(nullptr, nullptr, renew);
    });
    return *pool;
}

}  // namespace

void team_for(std::size_t count, int threads, const std::function<void(std::size_t)>& body) {
    const GompParallel entry = team.load();
    const auto members = static_cast<unsigned>(std::min<std::size_t>(std::max(threads, 1), count));
    if (entry == nullptr || members < 2) return parallel_for(count, threads, body);
    Job job(count, body);
    entry([](void* data) { static_cast<Job*>(data)->work(); }, &job, members, 0);
}

void set_team(GompParallel entry) { team.store(entry); }

void parallel_for(std::size_t count, int threads, const std::function<void(std::size_t)>& body,
                  const std::function<bool()>& stop) {
    const auto helpers = static_cast<int>(std::min<std::size_t>(std::max(threads, 1), count)) - 1;
    if (helpers > 0) {
        the_pool().run(count, helpers, body, stop);
    } else {
        Job(count, body).work(stop);
    }
}

}  // namespace polydpo
