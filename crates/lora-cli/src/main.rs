//! The `lora` binary.

fn main() -> std::process::ExitCode {
    lora_cli::main()
}
