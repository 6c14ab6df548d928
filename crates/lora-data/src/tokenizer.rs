//! The tokenizer of a checkpoint folder, with its special tokens and chat templates.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings};
use tokenizers::{PostProcessor, PostProcessorWrapper};

use crate::classes::EncodedText;
use crate::clock::Clock;
use crate::error::{DataError, Result};
use crate::fingerprint::MAX_VOCABULARY;
use crate::special_tokens::{SpecialTokens, added_tokens};
use crate::template::ChatTemplate;
use crate::template_builtin::{builtin_source, builtin_templates};
use crate::tokenizer_files::{TokenizerFiles, for_library};
use crate::tokenizer_guard::{Growth, check_around};

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    dir: PathBuf,
    /// Without the post-processor: it would cut white space out of the offsets that masks are made from.
    inner: tokenizers::Tokenizer,
    /// What `add_special_tokens` means for this tokenizer.
    post_processor: Option<PostProcessorWrapper>,
    growth: Growth,
    special: SpecialTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    appends_eos: bool,
    vocab_size: usize,
    template: Option<ChatTemplate>,
    tool_template: Option<ChatTemplate>,
    clock: Clock,
    digest: String,
    files: Vec<PathBuf>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("dir", &self.dir).field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json` and what lies beside it: `tokenizer_config.json`, `special_tokens_map.json` and the chat
    /// template (`chat_template.jinja`, else the key `chat_template`, else `chat_template.json`).
    ///
    /// The end token is the tokenizer's `eos_token`; when it names none, `eos_token_id` of `generation_config.json`,
    /// then of `config.json`.
    ///
    /// # Errors
    /// Names the file and the field that cannot be used.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut files = TokenizerFiles::new(dir);
        let path = files.path("tokenizer.json");
        let bytes = files.read("tokenizer.json")?.ok_or_else(|| DataError::NoTokenizer { path: path.clone() })?;
        let mut inner = parse(for_library(bytes, &path)?, &path)?;

        let config_path = files.path("tokenizer_config.json");
        let config = files.read_object("tokenizer_config.json")?;
        let mut special = SpecialTokens::default();
        special.add_from(&config, &config_path)?;
        let map = files.read_object("special_tokens_map.json")?;
        special.add_from(&map, &files.path("special_tokens_map.json"))?;
        add_missing_tokens(&mut inner, &config, &config_path)?;

        let id = |name: &str| special.named.get(name).and_then(|token| inner.token_to_id(token));
        let (bos, pad) = (id("bos_token"), id("pad_token"));
        let eos = match id("eos_token") {
            Some(id) => Some(id),
            None => files.model_eos_id()?,
        };
        if let Some(token) = eos.and_then(|id| inner.id_to_token(id)) {
            special.named.entry("eos_token".to_owned()).or_insert(token);
        }
        let (template, tool_template) = chat_templates(&mut files, &config, &special)?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocab_size > MAX_VOCABULARY {
            return Err(DataError::VocabularySize { path, id: vocab_size - 1, limit: MAX_VOCABULARY });
        }
        let around = inner.get_post_processor().map_or(0, |post| post.added_tokens(true).max(post.added_tokens(false)));
        check_around(&path, around)?;
        let mut tokenizer = Self {
            dir: dir.to_owned(),
            growth: Growth::of(&inner),
            post_processor: inner.get_post_processor().cloned(),
            inner,
            special,
            bos,
            eos,
            pad,
            appends_eos: false,
            vocab_size,
            template,
            tool_template,
            clock: Clock::System,
            files: files.companions(),
            digest: files.digest(),
        };
        tokenizer.inner.with_post_processor(None::<PostProcessorWrapper>);
        tokenizer.appends_eos = eos.is_some() && tokenizer.encode("", true)?.last().copied() == eos;
        Ok(tokenizer)
    }

    /// Sets where chat templates that write the date take it from.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self.template = self.template.map(|template| template.with_clock(clock));
        self.tool_template = self.tool_template.map(|template| template.with_clock(clock));
        self
    }

    /// The tokens of a text; with `add_special_tokens`, also those that the tokenizer puts around every text.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.guarded(text, |inner| inner.encode_fast(text, false))?;
        let Some(post) = self.post_processor.as_ref().filter(|_| add_special_tokens) else {
            return Ok(encoding.get_ids().to_vec());
        };
        let whole = post.process(encoding, None, true).map_err(|source| DataError::Encode { source })?;
        Ok(whole.get_ids().to_vec())
    }

    /// The tokens of a text, or of a pair of texts, with the special tokens that the tokenizer puts around and between
    /// them. With `max_length`, the longer of the two is cut first, as transformers does, on the left or the right.
    pub(crate) fn encode_pair(
        &self,
        text: &str,
        text_pair: Option<&str>,
        max_length: Option<usize>,
        from_left: bool,
    ) -> Result<EncodedText> {
        let mut first = self.guarded(text, |inner| inner.encode_fast(text, false))?;
        let mut second = text_pair.map(|t| self.guarded(t, |inner| inner.encode_fast(t, false))).transpose()?;
        if let Some(second) = &mut second {
            second.set_type_ids(vec![1; second.get_ids().len()]);
        }
        if let Some(max_length) = max_length {
            let special = self.post_processor.as_ref().map_or(0, |p| p.added_tokens(second.is_some()));
            let direction = if from_left { TruncationDirection::Left } else { TruncationDirection::Right };
            let max_length = max_length.saturating_sub(special);
            let params =
                TruncationParams { direction, max_length, strategy: TruncationStrategy::LongestFirst, stride: 0 };
            let cut = truncate_encodings(first, second, &params);
            (first, second) = cut.map_err(|source| DataError::Encode { source })?;
        }
        let whole = match (&self.post_processor, second) {
            (Some(post), second) => post.process(first, second, true),
            (None, None) => Ok(first),
            (None, Some(second)) => Ok(tokenizers::Encoding::merge([first, second], false)),
        };
        let whole = whole.map_err(|source| DataError::Encode { source })?;
        let types = whole.get_type_ids().iter().map(|&t| u8::try_from(t).unwrap_or(u8::MAX)).collect();
        Ok(EncodedText { ids: whole.get_ids().to_vec(), types })
    }

    /// The tokens of a text without special tokens around it, and the bytes of the text that each covers.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = self.guarded(text, |inner| inner.encode(text, false))?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// The tokens that stand before a completion: special tokens are added, but no end token after the prompt.
    pub(crate) fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if self.appends_eos {
            ids.pop();
        }
        Ok(ids)
    }

    /// The library panics where a damaged tokenizer contradicts itself.
    fn guarded(
        &self,
        text: &str,
        encode: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<tokenizers::Encoding>,
    ) -> Result<tokenizers::Encoding> {
        self.growth.check_encoding(text.len())?;
        catch_unwind(AssertUnwindSafe(|| encode(&self.inner)))
            .map_err(|_| DataError::EncodePanic { bytes: text.len() })?
            .map_err(|source| DataError::Encode { source })
    }

    /// The text of the end token.
    pub(crate) fn eos_token(&self) -> Option<&str> {
        self.special.named.get("eos_token").map(String::as_str)
    }

    /// The text of tokens.
    ///
    /// # Errors
    /// When the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let bytes = || ids.iter().filter_map(|id| self.inner.id_to_token(*id)).map(|token| token.len()).sum();
        self.growth.check_decoding(bytes)?;
        self.inner.decode(ids, skip_special_tokens).map_err(|source| DataError::Decode { source })
    }

    /// The end-of-sequence token.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos
    }

    /// The token that begins a sequence.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// The padding token.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad
    }

    /// One more than the highest token id: the rows an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// A token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether this is a special token: one that decoding may skip, or the end token.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        self.eos == Some(id) || added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// Whether this token stands for itself and is never made by merging text, as end-of-turn tokens do.
    pub(crate) fn is_added(&self, id: u32) -> bool {
        self.eos == Some(id) || self.inner.get_added_vocabulary().simple_id_to_token(id).is_some()
    }

    /// SHA-256 over the files that were used, in hexadecimal.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The chat template for conversations without tools.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The chat template for conversations with tools: the one named `tool_use`, else the same as without.
    pub fn tool_template(&self) -> Option<&ChatTemplate> {
        self.tool_template.as_ref().or(self.template.as_ref())
    }

    /// A chat template with this tokenizer's special tokens as variables: a built-in one by its name, else a file.
    ///
    /// # Errors
    /// When there is no such template, or the file cannot be read, or the template does not compile.
    pub fn template_named(&self, path: &Path) -> Result<ChatTemplate> {
        let name = path.to_str().unwrap_or_default();
        if let Some(source) = builtin_source(name) {
            let template = ChatTemplate::new(source, name, self.special.variables())?;
            return Ok(template.with_clock(self.clock));
        }
        // A word that is no file was meant as a name.
        if !path.exists() && !name.contains(['/', '\\', '.']) {
            let known = builtin_templates().collect::<Vec<_>>().join(", ");
            return Err(DataError::UnknownTemplate { name: name.to_owned(), known });
        }
        let source = std::fs::read_to_string(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        let template = ChatTemplate::new(&source, &path.display().to_string(), self.special.variables())?;
        Ok(template.with_clock(self.clock))
    }

    /// The tokenizer's files, to be copied beside an adapter byte for byte.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The folder it was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn parse(bytes: Vec<u8>, path: &Path) -> Result<tokenizers::Tokenizer> {
    // The library panics on some damaged files.
    let mut inner = catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
        .map_err(|_| DataError::TokenizerPanic { path: path.to_owned() })?
        .map_err(|source| DataError::TokenizerFile { path: path.to_owned(), source })?;
    // What a file says about cutting and padding belongs to whoever saved it.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|source| DataError::TokenizerFile { path: path.to_owned(), source })?;
    Ok(inner)
}

/// Tokens that only `added_tokens_decoder` knows, as older checkpoints have them.
fn add_missing_tokens(inner: &mut tokenizers::Tokenizer, config: &Map<String, Value>, path: &Path) -> Result<()> {
    for (wanted, token) in added_tokens(config, path)? {
        let content = token.content.clone();
        if inner.token_to_id(&content).is_none() {
            inner.add_tokens(&[token]);
        }
        match inner.token_to_id(&content) {
            Some(found) if found != wanted => {
                return Err(DataError::AddedTokenId { path: path.to_owned(), token: content, wanted, found });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The default template and the one for tools, from wherever the checkpoint keeps them.
fn chat_templates(
    files: &mut TokenizerFiles<'_>,
    config: &Map<String, Value>,
    special: &SpecialTokens,
) -> Result<(Option<ChatTemplate>, Option<ChatTemplate>)> {
    let compile = |source: &str, name: &str| ChatTemplate::new(source, name, special.variables());
    let mut default = None;
    let mut tools = None;
    if let Some(bytes) = files.read("chat_template.jinja")? {
        default = Some(compile(&String::from_utf8_lossy(&bytes), "chat_template.jinja")?);
        if let Some(bytes) = files.read("additional_chat_templates/tool_use.jinja")? {
            tools = Some(compile(&String::from_utf8_lossy(&bytes), "tool_use.jinja")?);
        }
        return Ok((default, tools));
    }
    let legacy = files.read_object("chat_template.json")?;
    match config.get("chat_template").or_else(|| legacy.get("chat_template")) {
        None | Some(Value::Null) => {}
        Some(Value::String(source)) => default = Some(compile(source, "tokenizer_config.json")?),
        Some(Value::Array(named)) => {
            for entry in named {
                let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default();
                match text("name") {
                    "default" => default = Some(compile(text("template"), "default")?),
                    "tool_use" => tools = Some(compile(text("template"), "tool_use")?),
                    _ => {}
                }
            }
        }
        Some(other) => {
            return Err(DataError::TokenizerField {
                path: files.path("tokenizer_config.json"),
                field: "chat_template".to_owned(),
                wanted: "a string or a list of named templates",
                found: crate::strict_json::kind(other).to_owned(),
            });
        }
    }
    Ok((default, tools))
}
