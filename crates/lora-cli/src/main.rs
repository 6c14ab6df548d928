//! The `lora` binary.

/// Tokenising takes and gives back small pieces of memory all the time, which the system's allocator makes half as fast
/// again to do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    lora_cli::main()
}
