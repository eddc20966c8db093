// containerd's own suite for snapshotters, run against an nsfs that serves at -socket.
//
// Each check gets a plugin name of its own, so that checks running at one time do not meet. When it has ended, all its
// snapshots are removed, children before parents, and what they left is cleaned up.
package conformance

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var (
	socket = flag.String("socket", "", "where nsfs serves")
	names  atomic.Int64
)

func connect(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	connection, err := grpc.NewClient("unix://"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	name := fmt.Sprintf("conformance-%d", names.Add(1))
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), name)
	return snapshotter, func() error {
		defer connection.Close()
		return empty(snapshotter)
	}, nil
}

func empty(snapshotter snapshots.Snapshotter) error {
	ctx := context.Background()
	for removed := true; removed; {
		var all []string
		if err := snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			all = append(all, info.Name)
			return nil
		}); err != nil {
			return err
		}
		removed = false
		for _, name := range all {
			err := snapshotter.Remove(ctx, name)
			if err != nil && !errdefs.IsFailedPrecondition(err) {
				return err
			}
			removed = removed || err == nil
		}
	}
	return snapshotter.(snapshots.Cleaner).Cleanup(ctx)
}

// The name of the suite decides about one thing: whether a directory of a lower layer is renamed in the check Rename.
// overlayfs refuses that without redirect_dir, which containerd's diff does not understand; so containerd lets its own
// overlayfs off. TestRenameOfLowerDirectory says what happens instead.
func TestSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", connect)
}

// What programs see who rename a directory of a lower layer: EXDEV, upon which mv(1) and others copy.
func TestRenameOfLowerDirectory(t *testing.T) {
	ctx := context.Background()
	snapshotter, clean, err := connect(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := clean(); err != nil {
			t.Error(err)
		}
	}()
	write := func(key, parent string, change func(root string) error) error {
		mounts, err := snapshotter.Prepare(ctx, key, parent)
		if err != nil {
			return err
		}
		return mount.WithTempMount(ctx, mounts, change)
	}
	if err := write("lower", "", func(root string) error {
		return os.Mkdir(filepath.Join(root, "dir"), 0o755)
	}); err != nil {
		t.Fatal(err)
	}
	if err := snapshotter.Commit(ctx, "base", "lower"); err != nil {
		t.Fatal(err)
	}
	err = write("upper", "base", func(root string) error {
		return os.Rename(filepath.Join(root, "dir"), filepath.Join(root, "renamed"))
	})
	if !errors.Is(err, syscall.EXDEV) {
		t.Fatalf("expected EXDEV, got %v", err)
	}
}
