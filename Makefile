# Everything a newcomer runs. `make demo` and `make test` do their own set-up.
# Set-up installs Debian packages only when one is missing (root), and keeps the rest in .cache/.

PREFIX  ?= /usr
DESTDIR ?=
QUICK   ?=
FUZZ_SECONDS ?= 60

release := target/release
share   := $(DESTDIR)$(PREFIX)/share
export VIRTIOFSD ?= $(CURDIR)/.cache/peers/bin/virtiofsd
export BACKEND_FS ?= $(CURDIR)/$(release)/backend-fs
export BACKEND_VSOCK_UDS ?= $(CURDIR)/$(release)/backend-vsock-uds

.PHONY: all
all: build

.PHONY: build
build:  ## Build the daemons and tools (release).
	cargo build --release --locked -p backend-fs -p backend-vsock-uds -p hugepages

.PHONY: setup
setup:  ## Install what the other targets need.
	tests/setup packages peers

.PHONY: demo
demo: build  ## Boot an emulated DPU that mounts a directory of this host and works in it.
	tests/setup packages
	cargo run --release --locked -q -p e2e -- demo --daemon $(BACKEND_FS)

.PHONY: test
test: setup build test-unit test-conformance test-e2e  ## Everything below, in this order.

.PHONY: test-unit
test-unit:  ## Pure cores, daemons' parts and the tidy rules; no VM.
	cargo test --workspace --locked --exclude conformance --exclude virtio-driver

.PHONY: test-conformance
test-conformance: setup build  ## The real daemon under the virtio driver: attacks, life cycle, peers; no VM.
	cargo test --release --locked -p virtio-driver -p conformance

.PHONY: test-e2e
test-e2e: setup build  ## The emulated DPU: stock Debian kernels, one behaviour per case.
	cargo run --release --locked -q -p e2e -- run --group basic --daemon $(BACKEND_FS)

.PHONY: test-suites
test-suites: setup build  ## Third-party suites in the emulated DPU: pjdfstest, fsx, fio, stress-ng, dbench, git, sqlite.
	cargo run --release --locked -q -p e2e -- run --group conformance --daemon $(BACKEND_FS)

.PHONY: bench
bench: setup build  ## Side by side with virtiofsd, the C virtiofsd and the bare system calls. QUICK=1 for a look.
	cargo run --release --locked -q -p bench -- fs --ours $(BACKEND_FS) $(if $(QUICK),--quick)

.PHONY: fuzz
fuzz:  ## Run every fuzz target for FUZZ_SECONDS (needs cargo-fuzz).
	for target in $$(cargo fuzz list --fuzz-dir tests/fuzz); do \
	  mkdir -p .cache/fuzz/$$target; \
	  RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none $$target .cache/fuzz/$$target \
	    tests/fuzz/corpus/$$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

.PHONY: install
install: build  ## Install binaries, man pages, completions and the vhost-user description. DESTDIR and PREFIX apply.
	install -D -m 0755 $(release)/backend-fs $(DESTDIR)$(PREFIX)/libexec/backend-fs
	install -D -m 0755 $(release)/backend-vsock-uds $(DESTDIR)$(PREFIX)/libexec/backend-vsock-uds
	install -D -m 0755 $(release)/dpu-hugepages $(DESTDIR)$(PREFIX)/sbin/dpu-hugepages
	sed 's|/usr/libexec/|$(PREFIX)/libexec/|' share/qemu/vhost-user/60-backend-fs.json | \
	  install -D -m 0644 /dev/stdin $(DESTDIR)$(PREFIX)/share/qemu/vhost-user/60-backend-fs.json
	sed 's|/usr/libexec/|$(PREFIX)/libexec/|' share/qemu/vhost-user/60-backend-vsock-uds.json | \
	  install -D -m 0644 /dev/stdin $(DESTDIR)$(PREFIX)/share/qemu/vhost-user/60-backend-vsock-uds.json
	$(release)/backend-fs --generate man | install -D -m 0644 /dev/stdin $(share)/man/man1/backend-fs.1
	$(release)/backend-fs --generate bash | install -D -m 0644 /dev/stdin $(share)/bash-completion/completions/backend-fs
	$(release)/backend-fs --generate zsh | install -D -m 0644 /dev/stdin $(share)/zsh/site-functions/_backend-fs
	$(release)/backend-fs --generate fish | install -D -m 0644 /dev/stdin $(share)/fish/vendor_completions.d/backend-fs.fish
	$(release)/dpu-hugepages man | install -D -m 0644 /dev/stdin $(share)/man/man1/dpu-hugepages.1
	$(release)/dpu-hugepages completions bash | install -D -m 0644 /dev/stdin $(share)/bash-completion/completions/dpu-hugepages
	$(release)/dpu-hugepages completions zsh | install -D -m 0644 /dev/stdin $(share)/zsh/site-functions/_dpu-hugepages
	$(release)/dpu-hugepages completions fish | install -D -m 0644 /dev/stdin $(share)/fish/vendor_completions.d/dpu-hugepages.fish

.PHONY: clean
clean:  ## Remove build output and caches.
	rm -rf target .cache tests/fuzz/target

.PHONY: help
help:  ## This list.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  \1\t/' | expand -t 20
