//! The `lora` binary.

/// Tokenising takes and gives back small pieces of memory all the time; with the system's allocator it needs half as much
/// time again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    lora_cli::main()
}
