/* What a figure costs without an interpreter in the way: walks a list of paths and prints nanoseconds per path.

   touch MODE LIST ROUNDS < LIST has NUL-ended paths, relative to the working directory. MODE: stat (lstat of each), open
   (open, read of up to 4 KiB, close), seq (open, read to the end in pieces of 1 MiB, close; prints bytes per second).
   Prints one number per round. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 20];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static long touch(const char *path, char mode)
{
    struct stat status;
    long total = 0, n;
    int fd;

    if (mode == 's')
        return lstat(path, &status) ? -1 : 0;
    if ((fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
        return -1;
    do
        if ((n = read(fd, buffer, mode == 'o' ? 4096 : sizeof buffer)) > 0)
            total += n;
    while (mode == 'q' && n > 0);
    close(fd);
    return n < 0 ? -1 : total;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        errx(2, "usage: touch stat|open|seq LIST ROUNDS");
    char mode = strcmp(argv[1], "seq") ? argv[1][0] : 'q';
    FILE *list = fopen(argv[2], "r");
    if (!list)
        err(1, "%s", argv[2]);
    char **paths = NULL, *path = NULL;
    size_t count = 0, room = 0;
    while (getdelim(&path, &room, 0, list) > 0) {
        paths = realloc(paths, (count + 1) * sizeof *paths);
        paths[count++] = path;
        path = NULL;
        room = 0;
    }
    for (int round = atoi(argv[3]); round > 0; round--) {
        double start = now();
        long total = 0, n;
        for (size_t i = 0; i < count; i++) {
            if ((n = touch(paths[i], mode)) < 0)
                err(1, "%s", paths[i]);
            total += n;
        }
        double took = now() - start;
        printf("%.1f\n", mode == 'q' ? total / took : took * 1e9 / count);
    }
    return 0;
}
