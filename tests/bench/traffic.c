/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Steady TCP traffic on loopback, with both ends here.
 *
 *     traffic MODE PORT RATE SECONDS CONNECTIONS LOSSY
 *
 * long    CONNECTIONS connections, opened at the start; RATE segments a second: data, and an acknowledgement of each
 * short   RATE connections a second: request, response, close; ten segments each
 * reset   RATE connections a second that are reset as soon as they are open; four segments each
 *
 * With LOSSY above 0, a further connection, to LOSSY_ADDRESS, sends LOSSY segments a second, for loss rules of the
 * network namespace. Prints "ready" when the connections are open, and starts when it reads a line. After SECONDS, it
 * prints in JSON how many connections were made or segments with data sent, and the segments of the namespace.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAYLOAD 100
#define TICK_MS 2
#define LOSSY_ADDRESS 0x7f090909u /* 127.9.9.9 */
#define SOURCES 200	/* addresses that clients use in turn: each has 64,000 ports */
#define MOST_OPEN 1000	/* short connections, when the machine does not keep up */
#define PER_WORKER 8000 /* long connections of a process, with two descriptors each */

enum mode { LONG, SHORT, RESET };

struct connection {
	int client, server;
};

static const char *const MODES[] = { "long", "short", "reset" };
static const char payload[PAYLOAD];
static unsigned short port;
static enum mode mode;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

/* Return the segments that this network namespace has sent, retransmissions excluded. */
static long segments_sent(void)
{
	FILE *file = fopen("/proc/self/net/snmp", "r");
	char line[1024];
	long sent = -1;

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "Tcp: %*d %*d %*d %*d %*d %*d %*d %*d %*d %*d %ld", &sent) == 1)
			break;
	if (sent < 0)
		fail("/proc/self/net/snmp");
	fclose(file);
	return sent;
}

static struct sockaddr_in address(unsigned int host, unsigned short at)
{
	return (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(at), .sin_addr.s_addr = htonl(host) };
}

static int listen_on(void)
{
	struct sockaddr_in any = address(INADDR_ANY, port);
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (void *)&any, sizeof(any)) || listen(fd, 4096))
		fail("listen");
	return fd;
}

/* Connect; on loopback, the handshake is over when connect() returns. */
static int connect_to(unsigned int host)
{
	static unsigned int source;
	struct sockaddr_in from = address(INADDR_LOOPBACK + 1 + source++ % SOURCES, 0), to = address(host, port);
	int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (bind(fd, (void *)&from, sizeof(from)) || connect(fd, (void *)&to, sizeof(to)))
		fail("connect");
	return fd;
}

static void watch(int epoll, int fd)
{
	struct epoll_event readable = { .events = EPOLLIN, .data.fd = fd };

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &readable))
		fail("epoll_ctl");
}

/* Answer what can be read. Return false at the end of the connection. */
static bool answer(int fd)
{
	char buffer[1 << 12];
	ssize_t size = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);

	if (size > 0 && mode == SHORT)
		send(fd, payload, PAYLOAD, MSG_NOSIGNAL);
	return size > 0 || (size < 0 && errno == EAGAIN);
}

/* Serve all connections forever. */
static void serve(int listener)
{
	struct epoll_event ready[256];
	int epoll = epoll_create1(0);

	watch(epoll, listener);
	for (;;) {
		int count = epoll_wait(epoll, ready, 256, -1);

		for (int i = 0; i < count; i++) {
			int fd = ready[i].data.fd;

			if (fd != listener) {
				if (!answer(fd))
					close(fd);
				continue;
			}
			while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0)
				watch(epoll, fd);
		}
	}
}

static struct connection open_both_ends(int listener, unsigned int host)
{
	struct connection made = { .client = connect_to(host) };
	struct pollfd waiting = { .fd = listener, .events = POLLIN };

	poll(&waiting, 1, -1);
	made.server = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
	if (made.server < 0)
		fail("accept");
	return made;
}

/* Send a segment and read it: on loopback it has arrived when send() returns. */
static void exchange(struct connection both)
{
	char buffer[1 << 12];

	send(both.client, payload, PAYLOAD, MSG_NOSIGNAL | MSG_DONTWAIT);
	recv(both.server, buffer, sizeof(buffer), MSG_DONTWAIT);
}

static void open_and_reset(void)
{
	struct linger at_once = { .l_onoff = 1 };
	int fd = connect_to(INADDR_LOOPBACK);

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	close(fd);
}

static void request(int epoll)
{
	int fd = connect_to(INADDR_LOOPBACK);

	send(fd, payload, PAYLOAD, MSG_NOSIGNAL);
	watch(epoll, fd);
}

/* Wait, and close the connections whose response has come. Return how many. */
static int finish(int epoll, int wait_ms)
{
	struct epoll_event ready[256];
	char buffer[PAYLOAD];
	int count = epoll_wait(epoll, ready, 256, wait_ms);

	for (int i = 0; i < count; i++) {
		recv(ready[i].data.fd, buffer, sizeof(buffer), 0);
		close(ready[i].data.fd);
	}
	return count;
}

/* Keep the rate of sends or connections, in even ticks. Return how many there were. */
static long run(double rate, double seconds, const struct connection *connections, int count)
{
	double start = now_s(), elapsed;
	int epoll = epoll_create1(0);
	long done = 0, closed = 0;

	while ((elapsed = now_s() - start) < seconds) {
		for (; done < rate * elapsed && (mode != SHORT || done - closed < MOST_OPEN); done++) {
			if (mode == SHORT)
				request(epoll);
			else if (mode == RESET)
				open_and_reset();
			else
				exchange(connections[done % count]);
		}
		closed += finish(epoll, TICK_MS);
	}
	while (finish(epoll, 100))
		;
	return done;
}

static void wait_for_start(int start)
{
	char byte;

	while (read(start, &byte, 1) > 0)
		;
}

static void report(int result, long done)
{
	if (write(result, &done, sizeof(done)) != sizeof(done))
		fail("write");
}

/* Open a share of the connections, report 0, run when the pipe `start` closes, and report what was done. */
static void worker(int listener, int share, double rate, double seconds, int start, int result)
{
	struct connection *connections = calloc(share + 1, sizeof(*connections));
	long done = 0;

	for (int i = 0; i < share; i++)
		connections[i] = open_both_ends(listener, INADDR_LOOPBACK);
	report(result, done);
	wait_for_start(start);
	done = run(rate, seconds, connections, share);
	report(result, done);
	exit(0);
}

/* The same for the connection that loses segments. */
static void lossy_worker(int listener, int rate, double seconds, int start, int result)
{
	struct connection both = open_both_ends(listener, LOSSY_ADDRESS);
	long done = 0;
	double end;

	report(result, done);
	wait_for_start(start);
	for (end = now_s() + seconds; now_s() < end; usleep(1000000 / rate))
		exchange(both);
	report(result, done);
	exit(0);
}

/* Fork a process that dies with this one, and has not the end of the pipe that starts the workers. */
static pid_t child(int start)
{
	pid_t pid = fork();

	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(start);
	}
	return pid;
}

static long sum_of(int result, int workers)
{
	long each, sum = 0;

	for (int i = 0; i < workers; i++, sum += each)
		if (read(result, &each, sizeof(each)) != sizeof(each))
			fail("worker");
	return sum;
}

int main(int argc, char **argv)
{
	int listener, start[2], result[2], connections, workers, lossy_rate;
	double rate, seconds;
	pid_t server = 0;
	long before;
	char line[16];

	if (argc != 7)
		return 2;
	while (strcmp(MODES[mode], argv[1]))
		if (++mode > RESET)
			return 2;
	port = atoi(argv[2]);
	rate = atof(argv[3]) / (mode == LONG ? 2 : 1);
	seconds = atof(argv[4]);
	connections = mode == LONG ? atoi(argv[5]) : 0;
	workers = 1 + (connections - 1) / PER_WORKER;
	lossy_rate = atoi(argv[6]);
	listener = listen_on();
	if (pipe(start) || pipe(result))
		fail("pipe");
	for (int i = 0; i < workers; i++) { /* in turn: they accept from one listener */
		if (child(start[1]) == 0)
			worker(listener, connections / workers, rate / workers, seconds, start[0], result[1]);
		sum_of(result[0], 1);
	}
	if (lossy_rate && child(start[1]) == 0)
		lossy_worker(listener, lossy_rate, seconds, start[0], result[1]);
	sum_of(result[0], lossy_rate > 0);
	if (mode != LONG && (server = child(start[1])) == 0)
		serve(listener);
	close(result[1]); /* so that the end of a worker shows */
	puts("ready");
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 0;
	before = segments_sent();
	close(start[1]);
	printf("{\"done\": %ld, ", sum_of(result[0], workers + (lossy_rate > 0)));
	printf("\"segments\": %ld}\n", segments_sent() - before);
	if (server)
		kill(server, SIGKILL);
	return 0;
}
