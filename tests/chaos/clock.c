// Steps CLOCK_REALTIME for the processes that preload this, by the nanoseconds (int64) in the file CHAOS_CLOCK.
//
// Waits until a time of that clock end when the stepped clock reaches it, as in the kernel: after a step back, late.
// Everything else, such as monotonic clocks and sleeps, is not touched.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000LL
#define SLICE_NS (SECOND_NS / 5)
#define MONOTONIC_BELOW_NS (SECOND_NS << 29) // 17 years of uptime

static const volatile int64_t none, *step_ns = &none;

__attribute__((constructor)) static void map_step(void)
{
	const char *path = getenv("CHAOS_CLOCK");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(*step_ns), PROT_READ, MAP_SHARED, file, 0);

	if (page != MAP_FAILED)
		step_ns = page;
	if (file >= 0)
		close(file);
}

static int64_t ns(const struct timespec *time)
{
	return time->tv_sec * SECOND_NS + time->tv_nsec;
}

static struct timespec timespec(int64_t ns)
{
	return (struct timespec){ .tv_sec = ns / SECOND_NS, .tv_nsec = ns % SECOND_NS };
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
	if (syscall(SYS_clock_gettime, clock, time))
		return -1;
	if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
		*time = timespec(ns(time) + *step_ns);
	return 0;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return ns(&now);
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
	int64_t now = now_ns();

	(void)zone;
	*time = (struct timeval){ .tv_sec = now / SECOND_NS, .tv_usec = now % SECOND_NS / 1000 };
	return 0;
}

time_t time(time_t *time)
{
	time_t now = now_ns() / SECOND_NS;

	if (time)
		*time = now;
	return now;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
			   const struct timespec *restrict until)
{
	int64_t left_ns;
	int result = ETIMEDOUT;

	if (ns(until) < MONOTONIC_BELOW_NS) // the condition's attribute says which clock, but cannot be read
		return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, until);
	while (result == ETIMEDOUT && (left_ns = ns(until) - now_ns()) > 0) {
		struct timespec slice;

		syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &slice);
		slice = timespec(ns(&slice) + (left_ns < SLICE_NS ? left_ns : SLICE_NS));
		result = pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &slice);
	}
	return result;
}

int cnd_timedwait(cnd_t *restrict cond, mtx_t *restrict mutex, const struct timespec *restrict until)
{
	int result = pthread_cond_timedwait((pthread_cond_t *)cond, (pthread_mutex_t *)mutex, until);

	return result == 0 ? thrd_success : result == ETIMEDOUT ? thrd_timedout : thrd_error;
}
