/* What a node believes of its disk and its clock, changed while it runs; loaded into it with LD_PRELOAD.

   CHAOS_CONTROL names a file of one page that both sides map: the fields of `struct control`.
   CHAOS_DISK names the directory whose files the disk faults are for, so that logs go on.

   Only calls through the C library's symbols pass here: CPython, LevelDB and numpy make no others. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
  volatile int32_t disk;          /* one of enum disk */
  volatile int32_t sync_delay_ms; /* added to each fsync and fdatasync */
  volatile int64_t clock_ns;      /* added to the wall clock */
};
enum disk { FINE = 0, FULL = 1, SYNC_FAILS = 2 };

static struct control none;
static struct control *control = &none;
static char directory[4096];

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CHAOS_CONTROL"), *disk = getenv("CHAOS_DISK");
  if (!path || !disk || !realpath(disk, directory)) return;
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  void *page = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (page != MAP_FAILED) control = page;
}

static int concerns(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  size_t prefix = strlen(directory);
  return length > 0 && prefix && (size_t)length >= prefix && !memcmp(path, directory, prefix);
}

static int fails(int fd, int error) {
  if (!concerns(fd)) return 0;
  errno = error;
  return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FULL_OR(fd, call) return control->disk == FULL && fails(fd, ENOSPC) ? -1 : (call)

ssize_t write(int fd, const void *data, size_t size) { REAL(write); FULL_OR(fd, real(fd, data, size)); }
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(writev); FULL_OR(fd, real(fd, parts, count)); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); FULL_OR(fd, real(fd, data, size, at)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(pwrite64);
  FULL_OR(fd, real(fd, data, size, at));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
  REAL(pwritev);
  FULL_OR(fd, real(fd, parts, count, at));
}
int posix_fallocate(int fd, off_t at, off_t size) {
  REAL(posix_fallocate);
  return control->disk == FULL && concerns(fd) ? ENOSPC : real(fd, at, size);
}
int fallocate(int fd, int mode, off_t at, off_t size) { REAL(fallocate); FULL_OR(fd, real(fd, mode, at, size)); }

static int sync_fails(int fd) {
  if (control->sync_delay_ms > 0 && concerns(fd)) usleep(1000u * (unsigned)control->sync_delay_ms);
  return control->disk == SYNC_FAILS && fails(fd, EIO);
}
int fsync(int fd) { REAL(fsync); return sync_fails(fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return sync_fails(fd) ? -1 : real(fd); }

static int in_directory(const char *path) {
  char whole[4096];
  return realpath(path, whole) && directory[0] && !strncmp(whole, directory, strlen(directory));
}
#define NO_ROOM(facts) ((facts)->f_bavail = (facts)->f_bfree = 0)
int statvfs(const char *path, struct statvfs *facts) {
  REAL(statvfs);
  int result = real(path, facts);
  if (!result && control->disk == FULL && in_directory(path)) NO_ROOM(facts);
  return result;
}
int statvfs64(const char *path, struct statvfs64 *facts) {
  REAL(statvfs64);
  int result = real(path, facts);
  if (!result && control->disk == FULL && in_directory(path)) NO_ROOM(facts);
  return result;
}
int fstatvfs(int fd, struct statvfs *facts) {
  REAL(fstatvfs);
  int result = real(fd, facts);
  if (!result && control->disk == FULL && concerns(fd)) NO_ROOM(facts);
  return result;
}
int fstatvfs64(int fd, struct statvfs64 *facts) {
  REAL(fstatvfs64);
  int result = real(fd, facts);
  if (!result && control->disk == FULL && concerns(fd)) NO_ROOM(facts);
  return result;
}

int clock_gettime(clockid_t which, struct timespec *now) {
  REAL(clock_gettime);
  int result = real(which, now);
  if (!result && control->clock_ns && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) {
    int64_t ns = now->tv_sec * 1000000000ll + now->tv_nsec + control->clock_ns;
    now->tv_sec = ns / 1000000000ll;
    now->tv_nsec = ns % 1000000000ll;
  }
  return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  REAL(gettimeofday);
  int result = real(now, zone);
  if (!result && control->clock_ns) {
    int64_t us = now->tv_sec * 1000000ll + now->tv_usec + control->clock_ns / 1000;
    now->tv_sec = us / 1000000ll;
    now->tv_usec = us % 1000000ll;
  }
  return result;
}
time_t time(time_t *where) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (where) *where = now.tv_sec;
  return now.tv_sec;
}
