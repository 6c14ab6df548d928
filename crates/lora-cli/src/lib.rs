//! The `lora` command as a library, so that tests start the very same program.
/// Runs the command line and returns its exit code.
pub fn main() -> std::process::ExitCode { std::process::ExitCode::SUCCESS }
