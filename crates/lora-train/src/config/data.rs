//! `[data]`: what is trained on, and what is evaluated.

use super::keys::{Kind, Range, choice, section};
use std::path::PathBuf;

choice! {
    /// What happens to an example with more tokens than `max_length`.
    Truncation {
        /// The run stops and names the example.
        Refuse = "refuse",
        /// The example is left out.
        Drop = "drop",
        /// Its first tokens are cut off.
        Left = "left",
        /// Its last tokens are cut off.
        Right = "right",
        /// Tokens in its middle are cut out.
        Middle = "middle",
        /// Its earliest turns are left out until the rest fits.
        LeftTurns = "left_turns",
        /// Its latest turns are left out.
        RightTurns = "right_turns",
        /// Turns in its middle are left out.
        MiddleTurns = "middle_turns",
        /// It becomes several rows.
        Split = "split",
    }
}

choice! {
    /// What a record of a text file is.
    TextBy {
        /// Each line that is not blank.
        Line = "line",
        /// The lines between blank ones.
        Paragraph = "paragraph",
        /// The whole file.
        Document = "document",
    }
}

choice! {
    /// How several datasets become one.
    Mixing {
        /// One after the other; a weight says how often each is taken.
        Concat = "concat",
        /// One after the other in every epoch, too: a curriculum.
        Sequential = "sequential",
        /// Drawn by weight, until one has run out.
        InterleaveUnder = "interleave_under",
        /// Drawn by weight, until all have run out; one that has begins again.
        InterleaveOver = "interleave_over",
        /// Drawn by weight, each example once.
        InterleaveOnce = "interleave_once",
    }
}

choice! {
    /// Whether tokens are kept between runs.
    Cache {
        /// Of data that takes long to tokenise.
        Auto = "auto",
        /// Of all data.
        Always = "always",
        /// Of none.
        Never = "never",
    }
}

choice! {
    /// What happens to a record that cannot be used.
    BadRecords {
        /// The run stops and names it.
        Refuse = "refuse",
        /// It is left out and counted.
        Skip = "skip",
    }
}

choice! {
    /// What preference data is used for in plain fine-tuning.
    Preference {
        /// It is refused.
        Refuse = "refuse",
        /// The better answers are trained.
        Chosen = "chosen",
    }
}

/// The formats of a dataset, by name.
const FORMATS: &[&str] = &[
    "alpaca",
    "sharegpt",
    "messages",
    "prompt_completion",
    "preference",
    "kto",
    "text",
    "tokenized",
    "classification",
];

section! {
    /// One dataset.
    SourceConfig {
        /// A file, a folder of files or a pattern as `data/*.jsonl`: JSON, JSON Lines, CSV, TSV, Parquet, Arrow, Feather or text, each
        /// also with `.gz` or `.zst` behind; `dataset_info.json#NAME`, an entry of LLaMA-Factory's list of datasets; or
        /// `hf://OWNER/NAME`, a dataset of the hub, which the program fetches where the cache lacks it.
        path: PathBuf = PathBuf::new(), Kind::Text;
        /// Format of the records; told from the keys of the first record when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        format: Option<String> = None, Kind::Choice(FORMATS);
        /// Table from our field names to the file's, where they differ, as `{ prompt = "question" }`.
        #[serde(with = "super::ordered", skip_serializing_if = "Vec::is_empty")]
        columns: Vec<(String, String)> = Vec::new(), Kind::Map(&Kind::Text);
        /// What the messages call their parts and roles, where that is unusual: `role_tag`, `content_tag`, `user_tag`, `assistant_tag`,
        /// `observation_tag`, `function_tag`, `system_tag`.
        #[serde(with = "super::ordered", skip_serializing_if = "Vec::is_empty")]
        tags: Vec<(String, String)> = Vec::new(), Kind::Map(&Kind::Text);
        /// What a record of a text file is: `line`, `paragraph` or `document`.
        #[serde(skip_serializing_if = "is_line")]
        text_by: TextBy = TextBy::Line, Kind::Choice(TextBy::NAMES);
        /// In a text file, what stands between prompt and completion of a record.
        #[serde(skip_serializing_if = "Option::is_none")]
        separator: Option<String> = None, Kind::Text;
        /// Split of a dataset of the hub; `train` when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        split: Option<String> = None, Kind::Text;
        /// Takes the first so many records only; all when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_samples: Option<u64> = None, Kind::Integer { min: 1, max: i64::MAX };
        /// How often the dataset counts: with `mixing = "concat"` how many times it is taken, else its share among the weights.
        #[serde(skip_serializing_if = "Option::is_none")]
        weight: Option<f64> = None, Kind::Number(Range::Positive);
    }
}

section! {
    /// The data. Examples are laid end to end, so that no padding is ever computed.
    DataConfig {
        /// What is trained on: a path, a list of paths, or a list of tables with `path` and what else is below.
        train: Vec<SourceConfig> = Vec::new(), Kind::Tables(SourceConfig::KEYS);
        /// What is evaluated, written as `train` is.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        eval: Vec<SourceConfig> = Vec::new(), Kind::Tables(SourceConfig::KEYS);
        /// Takes this part of `train` for evaluation instead: a fraction below 1, or a number of examples; 0 takes none.
        eval_split: f64 = 0.0, Kind::Split;
        /// The old set, written as `train` is: what an adapter that goes on was trained on before, some of which is trained again among
        /// the new examples, so that it is not forgotten.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        replay: Vec<SourceConfig> = Vec::new(), Kind::Tables(SourceConfig::KEYS);
        /// The share of the rows of each pass that comes from `replay`: all of the new ones are trained, and as many of the old ones as
        /// make this share, drawn by the seed and none again before all were taken.
        #[serde(skip_serializing_if = "is_zero")]
        replay_share: f64 = 0.0, Kind::Number(Range::ZeroToBelowOne);
        /// Folder in which datasets and models of the hub are kept, for paths as `hf://OWNER/NAME`; the program takes it from
        /// `HF_HUB_CACHE`, `HF_HOME` or the home folder when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        hub_cache: Option<PathBuf> = None, Kind::Text;
        /// Whether tokens are kept in files from which the next run maps them, so that it starts at once and the data need not fit
        /// into memory: `auto` where the files have 16 MiB and more, `always`, `never`.
        #[serde(skip_serializing_if = "is_auto")]
        cache: Cache = Cache::Auto, Kind::Choice(Cache::NAMES);
        /// Folder of those files; the program takes `lora/tokens` in `XDG_CACHE_HOME` or `~/.cache` when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        cache_dir: Option<PathBuf> = None, Kind::Text;
        /// How several datasets of `train` become one: `concat`; `sequential`, which trains all of one before the next begins; or one
        /// of `interleave_under`, `interleave_over`, `interleave_once`.
        #[serde(skip_serializing_if = "is_concat")]
        mixing: Mixing = Mixing::Concat, Kind::Choice(Mixing::NAMES);
        /// Leaves out examples whose tokens and mask are those of an example before.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        dedup: bool = false, Kind::Bool;
        /// What happens to a record that cannot be used: `refuse` stops the run and names it, `skip` leaves it out and counts it.
        #[serde(skip_serializing_if = "is_refuse")]
        bad_records: BadRecords = BadRecords::Refuse, Kind::Choice(BadRecords::NAMES);
        /// With `bad_records = "skip"`, the run stops when a larger share of a dataset's records than this is bad.
        #[serde(skip_serializing_if = "is_usual_share")]
        max_bad_share: f64 = MAX_BAD_SHARE, Kind::Number(Range::ZeroToOne);
        /// What preference data is used for: `refuse` stops the run, `chosen` trains the better answers and those rated good.
        #[serde(skip_serializing_if = "refuses_pairs")]
        preference: Preference = Preference::Refuse, Kind::Choice(Preference::NAMES);
        /// Tokens of the longest example, and of a packed row.
        max_length: u32 = 2048, Kind::Integer { min: 2, max: 16_777_216 };
        /// Fills rows up to `max_length` tokens with as many examples as fit. Attention never crosses examples.
        packing: bool = false, Kind::Bool;
        /// What happens to an example of more than `max_length` tokens: `refuse` stops the run, `drop` leaves it out, `left`,
        /// `right` and `middle` cut tokens off there, `left_turns`, `right_turns` and `middle_turns` leave whole turns out,
        /// `split` makes several rows of it. Every cut is counted in the summary.
        truncation: Truncation = Truncation::Right, Kind::Choice(Truncation::NAMES);
        /// Chat template that goes before the tokenizer's own: a Jinja file, or a name: `alpaca`, `chatml`, `gemma`, `llama2`,
        /// `llama3`, `mistral`, `phi3`, `vicuna`, `zephyr`.
        #[serde(skip_serializing_if = "Option::is_none")]
        template: Option<PathBuf> = None, Kind::Text;
        /// Variables for the chat template, as `{ enable_thinking = false }`.
        #[serde(skip_serializing_if = "toml::Table::is_empty")]
        template_variables: toml::Table = toml::Table::new(), Kind::Map(&Kind::Any);
        /// The day that a chat template writes when it writes the date, as `2026-11-24`; today when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        template_date: Option<String> = None, Kind::Date;
        /// Trains on the prompt's tokens too, and not on the answers only.
        train_on_prompt: bool = false, Kind::Bool;
        /// Trains on the last trained message of a conversation only, with the others as context.
        train_on_last_turn_only: bool = false, Kind::Bool;
        /// The roles whose messages are trained; `train` or `weight` of a message goes before.
        train_roles: Vec<String> = vec!["assistant".into()], Kind::Texts;
        /// The run stops when a larger share of the examples than this is cut or left out.
        max_affected_share: f64 = 0.05, Kind::Number(Range::ZeroToOne);
        /// Draws a new order of the examples for every epoch.
        shuffle: bool = true, Kind::Bool;
        /// Puts examples of similar length into a batch, so that batches differ less in what they cost. Not with `packing`.
        group_by_length: bool = false, Kind::Bool;
    }
}

/// One bad record in a thousand.
const MAX_BAD_SHARE: f64 = 0.001;

// Keys at their defaults are left out of a saved configuration, so that older ones stay what they are.
fn is_zero(share: &f64) -> bool {
    *share == 0.0
}

fn is_line(by: &TextBy) -> bool {
    *by == TextBy::Line
}

fn is_concat(mixing: &Mixing) -> bool {
    *mixing == Mixing::Concat
}

fn is_auto(cache: &Cache) -> bool {
    *cache == Cache::Auto
}

fn is_refuse(policy: &BadRecords) -> bool {
    *policy == BadRecords::Refuse
}

fn is_usual_share(share: &f64) -> bool {
    *share == MAX_BAD_SHARE
}

fn refuses_pairs(policy: &Preference) -> bool {
    *policy == Preference::Refuse
}
