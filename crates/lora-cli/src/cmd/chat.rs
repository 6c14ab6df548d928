//! `lora chat`: a conversation at the terminal.

use crate::failure::usage;
use crate::generator::{Generator, SamplingArgs};
use crate::interrupt::stop_while;
use crate::load::{ModelArgs, Wanted};
use crate::out;
use crate::prompt::Prompt;
use crate::serve::parse_mix;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The flags of `lora chat`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const HELP: &str = "/reset begins anew, /use NAME[=WEIGHT] ... changes the adapters (none for the base), /exit or Ctrl-D ends, \
     Ctrl-C stops an answer";

/// Runs the verb.
///
/// # Errors
/// What is wrong with model or adapter, or a tokenizer without a chat template.
pub(crate) fn run(args: &Args) -> Result<()> {
    args.model.check()?;
    let tokenizer = args.model.tokenizer()?;
    if tokenizer.template().is_none() {
        let dir = tokenizer.dir().display();
        return Err(usage(format!("{dir}: the tokenizer has no chat template; use `lora generate` to continue text")));
    }
    let mut served = args.model.load(Wanted::Language("chat"))?;
    let first: Vec<Value> = args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    let mut messages = first.clone();
    let typed = std::io::stdin().is_terminal();
    let busy = Arc::new(AtomicBool::new(false));
    let stop = stop_while(Arc::clone(&busy))?;
    if typed {
        out::note(HELP);
        if served.names().len() > 1 {
            out::note(format!("adapters: {}", served.names().join(", ")));
        }
    }
    let mut turn = 0;
    loop {
        if typed {
            out::text("> ")?;
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).context("cannot read from stdin")? == 0 {
            return if typed { out::line("") } else { Ok(()) };
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            "/reset" => {
                messages.clone_from(&first);
                out::note("the conversation begins anew");
                continue;
            }
            command if command.starts_with("/use ") => {
                let changed = parse_mix(&command["/use ".len()..]).and_then(|mix| served.activate(&mix));
                match changed {
                    Ok(()) => out::note(&command[1..]),
                    Err(e) => out::note(format!("{e:#}")),
                }
                continue;
            }
            command if command.starts_with('/') => {
                out::note(HELP);
                continue;
            }
            text => messages.push(json!({"role": "user", "content": text})),
        }
        let ids = Prompt::Messages(messages.clone()).encode(&tokenizer, false)?;
        stop.store(false, Ordering::Relaxed);
        busy.store(true, Ordering::Relaxed);
        let sampling = SamplingArgs { seed: args.sampling.seed.wrapping_add(turn), ..args.sampling.clone() };
        let generator = Generator::new(&served.model, &tokenizer);
        let answer = generator.run(&ids, args.max_new_tokens, &sampling, &mut |piece| {
            out::text(piece)?;
            Ok(!stop.load(Ordering::Relaxed))
        });
        busy.store(false, Ordering::Relaxed);
        let answer = answer?;
        out::line("")?;
        messages.push(json!({"role": "assistant", "content": answer.text}));
        turn += 1;
    }
}
