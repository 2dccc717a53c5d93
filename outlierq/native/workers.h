/* A few threads that share the rows of a product. They are started when first needed and sleep in between.

   A call that finds them busy with another one, or that cannot start them, does all the work itself. Who computes a row
   has no say in how it is summed, so results are the same for any number of threads. */

#ifndef OUTLIERQ_WORKERS_H
#define OUTLIERQ_WORKERS_H

#include <pthread.h>
#include <stdint.h>

#define MOST_WORKERS 255

typedef void (*share)(const void *job, int64_t first, int64_t end);

static struct {
    pthread_mutex_t calls, state;
    pthread_cond_t begun, done;
    int started, wanted, running;
    uint64_t call; /* counts calls, so that a worker sees a new one */
    share work;
    const void *job;
    int64_t count, step, next;
} crew = {.calls = PTHREAD_MUTEX_INITIALIZER,
          .state = PTHREAD_MUTEX_INITIALIZER,
          .begun = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

/* Piece after piece of the job that is under way, until none is left. */
static void take_shares(void) {
    int64_t first;
    while ((first = __atomic_fetch_add(&crew.next, crew.step, __ATOMIC_RELAXED)) < crew.count)
        crew.work(crew.job, first, first + crew.step < crew.count ? first + crew.step : crew.count);
}

static void *worker(void *number) {
    uint64_t seen = 0;
    pthread_mutex_lock(&crew.state);
    for (;;) {
        while (crew.call == seen) pthread_cond_wait(&crew.begun, &crew.state);
        seen = crew.call;
        if ((intptr_t)number >= crew.wanted) continue;
        crew.running++;
        pthread_mutex_unlock(&crew.state);
        take_shares();
        pthread_mutex_lock(&crew.state);
        if (--crew.running == 0) pthread_cond_signal(&crew.done);
    }
    return NULL;
}

/* A process that was forked has no threads but its own. */
static void forget_workers(void) {
    pthread_mutex_init(&crew.calls, NULL);
    pthread_mutex_init(&crew.state, NULL);
    pthread_cond_init(&crew.begun, NULL);
    pthread_cond_init(&crew.done, NULL);
    crew.started = 0;
    crew.call = 0;
    crew.running = 0;
}

/* With the state locked: as many as are asked for, or as there is room for. */
static void start_workers(int count) {
    static int told = 0;
    if (!told) told = 1, pthread_atfork(NULL, NULL, forget_workers);
    pthread_t thread;
    while (crew.started < count && !pthread_create(&thread, NULL, worker, (void *)(intptr_t)crew.started)) {
        pthread_detach(thread);
        crew.started++;
    }
}

/* work(job, first, end) for all of `count`, on so many threads, this one among them. */
static void in_shares(share work, const void *job, int64_t count, int threads) {
    int helpers = (threads < count ? threads : (int)count) - 1;
    helpers = helpers < MOST_WORKERS ? helpers : MOST_WORKERS;
    if (helpers < 1 || pthread_mutex_trylock(&crew.calls)) {
        work(job, 0, count);
        return;
    }
    pthread_mutex_lock(&crew.state);
    start_workers(helpers);
    crew.wanted = helpers;
    crew.work = work, crew.job = job, crew.count = count, crew.next = 0;
    crew.step = count / (4 * (helpers + 1)) + 1;
    crew.call++;
    pthread_cond_broadcast(&crew.begun);
    pthread_mutex_unlock(&crew.state);
    take_shares();
    pthread_mutex_lock(&crew.state);
    crew.wanted = 0; /* who wakes up only now comes too late, and is not waited for */
    while (crew.running) pthread_cond_wait(&crew.done, &crew.state);
    pthread_mutex_unlock(&crew.state);
    pthread_mutex_unlock(&crew.calls);
}

#endif
