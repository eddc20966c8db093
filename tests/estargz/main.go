// Command estargz converts a tar, plain or compressed, to eStargz with the reference implementation, and prints what a
// manifest and a config would say of the result as JSON.
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"flag"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/opencontainers/go-digest"
)

const legacyFooterSize = 47

// legacy writes the footer of stargz as it was before eStargz: no subfield in the gzip header's extra field.
type legacy struct {
	*estargz.GzipCompressor
	*estargz.LegacyGzipDecompressor
}

func (l legacy) WriteTOCAndFooter(w io.Writer, off int64, toc *estargz.JTOC, diff hash.Hash) (digest.Digest, error) {
	tail := new(bytes.Buffer)
	tocDigest, err := l.GzipCompressor.WriteTOCAndFooter(tail, off, toc, diff)
	if err != nil {
		return "", err
	}
	if _, err := w.Write(tail.Bytes()[:tail.Len()-estargz.FooterSize]); err != nil {
		return "", err
	}
	return tocDigest, writeLegacyFooter(w, off)
}

func writeLegacyFooter(w io.Writer, off int64) error {
	footer := new(bytes.Buffer)
	gz, err := gzip.NewWriterLevel(footer, gzip.NoCompression)
	if err != nil {
		return err
	}
	gz.Header.Extra = []byte(fmt.Sprintf("%016xSTARGZ", off))
	if err := gz.Close(); err != nil {
		return err
	}
	if footer.Len() != legacyFooterSize {
		return fmt.Errorf("legacy footer has %d bytes", footer.Len())
	}
	_, err = w.Write(footer.Bytes())
	return err
}

type flags struct {
	in, out, toc, footer, prioritized string
	chunkSize, minChunkSize           int
}

func main() {
	var f flags
	flag.StringVar(&f.in, "in", "", "the tar")
	flag.StringVar(&f.out, "out", "", "where the blob goes")
	flag.StringVar(&f.toc, "toc", "", "where the table goes, with -footer external")
	flag.StringVar(&f.footer, "footer", "estargz", "estargz, legacy or external")
	flag.StringVar(&f.prioritized, "prioritized", "", "files to put before the landmark, one a line")
	flag.IntVar(&f.chunkSize, "chunk-size", 0, "bytes of a chunk, 0 for the default")
	flag.IntVar(&f.minChunkSize, "min-chunk-size", 0, "bytes of stream that a member has at least")
	flag.Parse()
	if err := convert(f); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func convert(f flags) error {
	in, err := os.Open(f.in)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	options, external := options(f)
	blob, err := estargz.Build(io.NewSectionReader(in, 0, info.Size()), options...)
	if err != nil {
		return err
	}
	defer blob.Close()
	if err := writeFile(f.out, func(w io.Writer) error { _, err := io.Copy(w, blob); return err }); err != nil {
		return err
	}
	if external != nil {
		if err := writeFile(f.toc, func(w io.Writer) error { _, err := external.WriteTOCTo(w); return err }); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]string{
		"toc_digest": blob.TOCDigest().String(),
		"diff_id":    blob.DiffID().String(),
	})
}

func options(f flags) (options []estargz.Option, external *externaltoc.GzipCompressor) {
	options = []estargz.Option{estargz.WithChunkSize(f.chunkSize), estargz.WithMinChunkSize(f.minChunkSize)}
	if f.prioritized != "" {
		options = append(options, estargz.WithPrioritizedFiles(strings.Split(f.prioritized, "\n")))
	}
	switch f.footer {
	case "legacy":
		options = append(options, estargz.WithCompression(
			legacy{estargz.NewGzipCompressor(), &estargz.LegacyGzipDecompressor{}}))
	case "external":
		external = externaltoc.NewGzipCompressor()
		options = append(options, estargz.WithCompression(
			&externaltoc.GzipCompression{GzipCompressor: external, GzipDecompressor: externaltoc.NewGzipDecompressor(nil)}))
	}
	return options, external
}

func writeFile(name string, write func(io.Writer) error) error {
	out, err := os.Create(name)
	if err != nil {
		return err
	}
	if err := write(out); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
