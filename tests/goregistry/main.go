// A registry with the referrers API on a free port of loopback, which it prints; it ends with its standard input.
//
// -delete=false refuses DELETE, as many registries do. Requests are logged, one line each, to the file -log.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sync"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	path := flag.String("log", "", "file of requests")
	deletes := flag.Bool("delete", true, "whether DELETE is allowed")
	flag.Parse()
	file, err := os.OpenFile(*path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	inner := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
	var lock sync.Mutex
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lock.Lock()
		fmt.Fprintf(file, "%s %s %s\n", r.Method, r.URL.RequestURI(), r.Header.Get("Range"))
		lock.Unlock()
		if r.Method == http.MethodDelete && !*deletes {
			http.Error(w, `{"errors":[{"code":"UNSUPPORTED","message":"deleting is not allowed"}]}`, http.StatusMethodNotAllowed)
			return
		}
		inner.ServeHTTP(w, r)
	})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println(listener.Addr().String())
	log.Fatal(http.Serve(listener, handler))
}
