//! From an error to what is printed and to the exit code.

use crate::out;
use signal_hook::low_level;
use std::fmt;
use std::process::ExitCode;

/// The run failed.
pub(crate) const FAILED: u8 = 1;
/// The command line, the configuration or the data is at fault.
pub(crate) const USAGE: u8 = 2;

/// A fault of the command line that no library knows of.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A fault of the command line as an error.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// Prints the error with its causes, once each, and gives the exit code. A reader that has gone away (`lora ... | head`) is
/// no error.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let broken_pipe = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if error.chain().any(|e| e.downcast_ref().is_some_and(broken_pipe)) {
        return ExitCode::SUCCESS;
    }
    out::note(format!("error: {}", message(error)));
    ExitCode::from(code(error))
}

/// Prints the error as [`report`] does, and ends the process at once: threads of a group that broke may wait for processes
/// that are gone.
pub(crate) fn leave(error: &anyhow::Error) -> ! {
    out::note(format!("error: {}", message(error)));
    low_level::exit(code(error).into())
}

/// The texts of an error and its causes. Many errors quote their cause; what is said already is not said again.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(without_place(&cause)) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A cause without the place in a single line or value that JSON readers add, which its error has told already.
fn without_place(cause: &str) -> &str {
    cause.find(" at line ").map_or(cause, |at| &cause[..at])
}

/// The first error of the chain that a library of ours made decides.
fn code(error: &anyhow::Error) -> u8 {
    let at_fault = error.chain().find_map(|e| {
        if let Some(e) = e.downcast_ref::<lora_train::Error>() {
            return Some(train_usage(e));
        }
        if let Some(e) = e.downcast_ref::<lora_model::Error>() {
            return Some(model_usage(e));
        }
        if let Some(e) = e.downcast_ref::<lora_format::Error>() {
            return Some(format_usage(e));
        }
        if let Some(e) = e.downcast_ref::<lora_export::Error>() {
            return Some(export_usage(e));
        }
        if let Some(e) = e.downcast_ref::<lora_report::Error>() {
            return Some(e.is_usage());
        }
        if let Some(e) = e.downcast_ref::<lora_hub::HubError>() {
            return Some(e.is_usage());
        }
        if let Some(e) = e.downcast_ref::<lora_torch::Error>() {
            return Some(e.is_usage());
        }
        let ours = e.is::<Usage>() || e.is::<lora_data::DataError>() || e.is::<lora_train::ConfigErrors>();
        ours.then_some(true)
    });
    if at_fault.unwrap_or(false) { USAGE } else { FAILED }
}

fn train_usage(e: &lora_train::Error) -> bool {
    match e {
        lora_train::Error::Format(e) => format_usage(e),
        lora_train::Error::Model(e) => model_usage(e),
        e => e.is_usage(),
    }
}

fn model_usage(e: &lora_model::Error) -> bool {
    match e {
        lora_model::Error::Torch(_) | lora_model::Error::Core(_) => false,
        lora_model::Error::Format(e) => format_usage(e),
        _ => true,
    }
}

/// A file that cannot be read is the user's to mend; one that cannot be written is the run's misfortune.
fn format_usage(e: &lora_format::Error) -> bool {
    match e {
        lora_format::Error::Io { action, .. } => ["open", "read", "map"].contains(action),
        lora_format::Error::Torch { .. } => false,
        _ => true,
    }
}

fn export_usage(e: &lora_export::Error) -> bool {
    match e {
        lora_export::Error::Format(e) => format_usage(e),
        lora_export::Error::Io { action, .. } => *action == "read",
        lora_export::Error::NoSpace { .. }
        | lora_export::Error::Merge { .. }
        | lora_export::Error::Disagrees { .. } => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    fn io(action: &'static str) -> lora_format::Error {
        let source = std::io::Error::other("no");
        lora_format::Error::Io { action, path: "x".into(), source }
    }

    #[test]
    fn files_that_cannot_be_read_are_the_users_and_others_are_not() {
        assert_eq!(code(&io("read").into()), USAGE);
        assert_eq!(code(&io("write").into()), FAILED);
        assert_eq!(code(&lora_train::Error::from(io("write")).into()), FAILED);
        assert_eq!(code(&lora_model::Error::from(io("open")).into()), USAGE);
        assert_eq!(code(&usage("no such flag")), USAGE);
        assert_eq!(code(&anyhow!("something broke")), FAILED);
        let wrapped: anyhow::Error = Err::<(), _>(io("read")).context("adapter a").unwrap_err();
        assert_eq!(code(&wrapped), USAGE);
    }

    #[test]
    fn a_cause_is_told_once() {
        let wrapped = Err::<(), _>(io("read")).context("adapter a").unwrap_err();
        assert_eq!(message(&wrapped), "adapter a: cannot read x: no");
        assert_eq!(message(&anyhow!("cause").context("outer")), "outer: cause");
    }
}
