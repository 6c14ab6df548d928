//! `lora generate`: continue one prompt, or many.

use crate::generator::{Generated, Generator, SamplingArgs};
use crate::load::{ModelArgs, Wanted};
use crate::out;
use crate::progress::CountBar;
use crate::prompt::{Prompt, Request, read_prompts};
use crate::serve::Mix;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::PathBuf;

/// The flags of `lora generate`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["prompt", "prompts"])))]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to continue; where the tokenizer has a chat template, a message to answer
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File of prompts: a .jsonl with `prompt` or `messages` in each record, and `adapter` where it is to be answered by
    /// another than all (a name, or a table of names and weights), or a prompt a line
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Take a prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// Print JSON: an object for --prompt, an array for --prompts
    #[arg(long)]
    json: bool,
}

/// A prompt and what came of it.
#[derive(Debug, Serialize)]
struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<String>,
    #[serde(flatten)]
    generated: Generated,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with model, adapter or prompts.
pub(crate) fn run(args: &Args) -> Result<()> {
    args.model.check()?;
    let prompts = match (&args.prompt, &args.prompts) {
        (Some(text), _) => vec![Request { prompt: Prompt::Text(text.clone()), adapters: None }],
        (None, Some(path)) => read_prompts(path)?,
        (None, None) => Vec::new(),
    };
    let tokenizer = args.model.tokenizer()?;
    let encode = |(i, request): (usize, &Request)| {
        request.prompt.encode(&tokenizer, args.raw).with_context(|| format!("prompt {}", i + 1))
    };
    let encoded = prompts.iter().enumerate().map(encode).collect::<Result<Vec<_>>>()?;
    let mut served = args.model.load(Wanted::Language("generate text"))?;
    let all: Mix = served.active().clone();
    Generator::new(&served.model, &tokenizer)
        .warn_of_length(encoded.iter().map(Vec::len).max().unwrap_or(0), args.max_new_tokens);

    let stream = args.prompt.is_some() && !args.json;
    let mut bar = CountBar::new("generating");
    let mut answers = Vec::new();
    for (i, (request, ids)) in prompts.iter().zip(&encoded).enumerate() {
        if prompts.len() > 1 {
            bar.set(i, prompts.len());
        }
        let seed = args.sampling.seed.wrapping_add(i as u64);
        let sampling = SamplingArgs { seed, ..args.sampling.clone() };
        let mut show = |piece: &str| {
            if stream {
                out::text(piece)?;
            }
            Ok(true)
        };
        let wanted = request.adapters.as_ref().unwrap_or(&all);
        if wanted != served.active() {
            served.activate(wanted).with_context(|| format!("prompt {}", i + 1))?;
        }
        let generator = Generator::new(&served.model, &tokenizer);
        let generated = generator.run(ids, args.max_new_tokens, &sampling, &mut show)?;
        let prompt = match &request.prompt {
            Prompt::Text(text) => Some(text.clone()),
            Prompt::Messages(_) => None,
        };
        answers.push(Answer { prompt, generated });
    }
    bar.finish();
    match (args.json, stream, answers.as_slice()) {
        (true, _, [one]) if args.prompt.is_some() => out::json(one),
        (true, _, all) => out::json(&all),
        (false, true, _) => out::line(""),
        (false, false, all) => all.iter().enumerate().try_for_each(|(i, answer)| {
            out::line(format!(
                "=== {}{}",
                i + 1,
                answer.prompt.as_ref().map(|p| format!(": {p}")).unwrap_or_default()
            ))?;
            out::line(&answer.generated.text)
        }),
    }
}
