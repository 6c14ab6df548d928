//! Where the hub is, where its cache is, and how patient we are.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ureq::Proxy;

use crate::error::{HubError, Result};

/// A secret that is sent to the hub and shown to nobody.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Takes a token; spaces and line ends around it are no part of it.
    ///
    /// # Errors
    /// [`HubError::Setting`] where it has characters that no header can carry. The message does not show it.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            let problem =
                "is empty or has characters that no token has; copy it again from the settings of your account";
            return Err(HubError::Setting { name: "the token (HF_TOKEN)", problem: problem.into() });
        }
        Ok(Self(text.to_owned()))
    }

    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// How the hub is reached.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The hub's address.
    pub endpoint: String,
    /// The folder in which `huggingface_hub` keeps what it fetched.
    pub cache: PathBuf,
    /// Sent to the endpoint's host and to no other.
    pub token: Option<Token>,
    /// Nothing is asked of any network.
    pub offline: bool,
    /// What stands between us and the network.
    pub proxy: Option<Proxy>,
    /// A file of certificates (PEM) that are trusted instead of the usual ones.
    pub ca_file: Option<PathBuf>,
    /// Until a connection stands.
    pub connect_timeout: Duration,
    /// For an answer to begin, and between two pieces of it.
    pub read_timeout: Duration,
    /// A transfer that brings less than this, in bytes a second over a `read_timeout`, counts as cut.
    pub min_rate: u64,
    /// So many attempts that bring nothing are made again, one after the other.
    pub retries: u32,
    /// Before the first of them, doubled for each that follows.
    pub backoff: Duration,
}

impl Settings {
    /// The public hub with usual patience.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: "https://huggingface.co".into(),
            cache: cache.into(),
            token: None,
            offline: false,
            proxy: None,
            ca_file: None,
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            min_rate: 256,
            retries: 5,
            backoff: Duration::from_millis(500),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::new(" hf_planted\n").unwrap();
        assert_eq!(token.header(), "Bearer hf_planted");
        let settings = Settings { token: Some(token), ..Settings::new("cache") };
        assert!(!format!("{settings:?}").contains("planted"));
        for bad in ["", " \n", "hf_pl anted", "hf_plänted", "hf_pl\r\nanted: x"] {
            assert!(!Token::new(bad).unwrap_err().to_string().contains("anted"), "{bad:?}");
        }
    }
}
