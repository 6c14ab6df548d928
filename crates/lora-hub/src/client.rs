//! Asking the hub: redirects by hand, so that the token goes to the hub alone.

use std::time::Duration;

use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::digest::Digest;
use crate::error::{HubError, Result};
use crate::listing::{Known, Listing};
use crate::redirect::{Origin, target};
use crate::repo::Repo;
use crate::settings::Settings;

/// A hub answers after two or three; more are a loop.
const MAX_REDIRECTS: usize = 10;
/// For what is small, so many attempts are made after the first.
pub(crate) const ASKED_AGAIN: u32 = 2;
/// The list of the largest repositories has some tens of megabytes.
const MAX_LIST: u64 = 256 << 20;
/// We wait no longer than this, though a server may ask for it.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It may be there next time.
    Passing { reason: String, wait: Option<Duration> },
    /// It will not.
    Final(Box<HubError>),
}

impl Fault {
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self::Passing { reason: reason.into(), wait: None }
    }
}

impl From<HubError> for Fault {
    fn from(error: HubError) -> Self {
        Self::Final(Box::new(error))
    }
}

/// The hub, as settings describe it.
pub(crate) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    endpoint: String,
    origin: Origin,
}

/// An answer, and whether the hub itself gave it or a store that it sent us to.
pub(crate) struct Reply {
    pub(crate) response: Response<Body>,
    pub(crate) of_hub: bool,
}

impl<'a> Client<'a> {
    pub(crate) fn new(settings: &'a Settings) -> Result<Self> {
        let endpoint = settings.endpoint.trim_end_matches('/').to_owned();
        let origin = Origin::of(&endpoint).ok_or_else(|| HubError::Setting {
            name: "the hub's address (HF_ENDPOINT)",
            problem: "must begin with https:// or http://, and name a host".into(),
        })?;
        let mut tls = TlsConfig::builder();
        if settings.ca_file.is_some() {
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates(settings)?));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(settings.proxy.clone())
            .tls_config(tls.build())
            .user_agent(concat!("lora/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(settings.connect_timeout))
            .timeout_connect(Some(settings.connect_timeout))
            .timeout_recv_response(Some(settings.read_timeout))
            .timeout_per_read(Some(settings.read_timeout))
            .timeout_per_write(Some(settings.read_timeout))
            .build();
        Ok(Self { agent: config.into(), settings, endpoint, origin })
    }

    pub(crate) fn host(&self) -> String {
        self.origin.shown()
    }

    pub(crate) fn settings(&self) -> &Settings {
        self.settings
    }

    /// Gets `path` of the hub, wherever it is kept.
    pub(crate) fn get(&self, path: &str, headers: &[(&str, String)]) -> std::result::Result<Reply, Fault> {
        let mut address = format!("{}/{path}", self.endpoint);
        for _ in 0..=MAX_REDIRECTS {
            let of_hub = Origin::of(&address).as_ref() == Some(&self.origin);
            // Compressed pieces have other lengths than the file.
            let mut request = self.agent.get(&address).header("accept-encoding", "identity");
            for (name, value) in headers {
                request = request.header(*name, value);
            }
            request = self.authorised(request, of_hub);
            let response = request.call().map_err(|e| Fault::passing(reason(&e)))?;
            if !is_redirect(response.status()) {
                return Ok(Reply { response, of_hub });
            }
            address = text(response.headers(), "location")
                .and_then(|l| target(&address, l))
                .ok_or_else(|| self.answer(path, "redirects to something that is no address, or from https to http"))?;
        }
        Err(self.answer(path, &format!("redirects more than {MAX_REDIRECTS} times")).into())
    }

    fn authorised<T>(&self, request: ureq::RequestBuilder<T>, of_hub: bool) -> ureq::RequestBuilder<T> {
        match &self.settings.token {
            Some(token) if of_hub => request.header("authorization", token.header()),
            _ => request,
        }
    }

    /// The files of a revision; asked again `retries` times.
    pub(crate) fn listing(&self, repo: &Repo, revision: &str, retries: u32) -> Result<Listing> {
        let what = repo.to_string();
        let path = format!("{}?blobs=true", repo.api(revision));
        self.patiently(&what, retries, || {
            let mut reply = self.get(&path, &[])?;
            self.expect_ok(&reply, &what)?;
            let body = reply.response.body_mut().with_config().limit(MAX_LIST).read_to_vec();
            let body = body.map_err(|e| Fault::passing(reason(&e)))?;
            Ok(Listing::parse(&what, &self.host(), &body)?)
        })
    }

    /// Size and digest of a file, as the headers before the file tell them.
    pub(crate) fn known(&self, repo: &Repo, commit: &str, file: &str) -> Result<Known> {
        let what = format!("{file} of {repo}");
        let address = format!("{}/{}", self.endpoint, repo.file(commit, file));
        self.patiently(&what, ASKED_AGAIN, || {
            let request = self.authorised(self.agent.head(&address).header("accept-encoding", "identity"), true);
            let response = request.call().map_err(|e| Fault::passing(reason(&e)))?;
            let reply = Reply { response, of_hub: true };
            let headers = reply.response.headers();
            // What a large file's redirect leads to says nothing of the hub's own digest.
            let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
            let digest = etag.and_then(|tag| Digest::parse(tag.trim_start_matches("W/").trim_matches('"')));
            let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
            let known =
                digest.zip(size.and_then(|size| size.parse().ok())).map(|(digest, size)| Known { size, digest });
            if let Some(known) =
                known.filter(|_| reply.response.status().is_success() || is_redirect(reply.response.status()))
            {
                return Ok(known);
            }
            self.expect_ok(&reply, &what)?;
            Err(self.answer(&what, "tells neither size nor digest of a file").into())
        })
    }

    /// Asks again, with pauses, while what is wrong may pass.
    fn patiently<T>(
        &self,
        what: &str,
        retries: u32,
        mut ask: impl FnMut() -> std::result::Result<T, Fault>,
    ) -> Result<T> {
        let mut failures = 0;
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(Fault::Final(error)) => return Err(*error),
                Err(Fault::Passing { reason, .. }) if failures >= self.settings.retries.min(retries) => {
                    return Err(HubError::Unreachable { what: what.into(), host: self.host(), reason });
                }
                Err(Fault::Passing { wait, .. }) => {
                    self.pause(failures, wait);
                    failures += 1;
                }
            }
        }
    }

    /// Waits before the next attempt.
    pub(crate) fn pause(&self, failures: u32, asked: Option<Duration>) {
        let own = self.settings.backoff.saturating_mul(1 << failures.min(6));
        std::thread::sleep(asked.unwrap_or(own).min(MAX_WAIT));
    }

    /// Refuses an answer that is none.
    pub(crate) fn expect_ok(&self, reply: &Reply, what: &str) -> std::result::Result<(), Fault> {
        let (status, headers) = (reply.response.status(), reply.response.headers());
        let (what, host) = (what.to_owned(), self.host());
        match status.as_u16() {
            200..=299 => Ok(()),
            408 | 429 | 500..=599 => {
                let wait = text(headers, "retry-after").and_then(|s| s.parse().ok()).map(Duration::from_secs);
                Err(Fault::Passing { reason: format!("the answer was status {status}"), wait })
            }
            // The address that a store was given for is short-lived; the hub gives another.
            401 | 403 if !reply.of_hub => Err(Fault::passing(format!("the store answered with status {status}"))),
            code @ (401 | 403) => {
                let remedy = match (&self.settings.token, text(headers, "x-error-code")) {
                    (_, Some("GatedRepo")) => {
                        "accept its terms on its page, and give the token of that account in HF_TOKEN"
                    }
                    (None, _) => "there is none of this name, or it is private: give a token in HF_TOKEN",
                    (Some(_), _) => "there is none of this name, or the token (HF_TOKEN) does not give access to it",
                };
                Err(HubError::Denied { what, host, status: code, remedy }.into())
            }
            404 => Err(HubError::NotFound { what, host }.into()),
            _ => Err(self.answer(&what, &format!("the answer was status {status}")).into()),
        }
    }

    pub(crate) fn answer(&self, what: &str, problem: &str) -> HubError {
        let what = what.split('?').next().unwrap_or_default();
        HubError::Answer { what: what.into(), host: self.host(), problem: problem.into() }
    }
}

fn certificates(settings: &Settings) -> Result<Vec<Certificate<'static>>> {
    let Some(path) = &settings.ca_file else { return Ok(Vec::new()) };
    let pem = std::fs::read(path).map_err(HubError::io("read", path))?;
    let certificate = |item| if let Ok(PemItem::Certificate(found)) = item { Some(found) } else { None };
    let found: Vec<_> = parse_pem(&pem).filter_map(certificate).collect();
    if found.is_empty() {
        let problem = format!("{} holds no certificate in PEM", path.display());
        return Err(HubError::Setting { name: "the file of trusted certificates (SSL_CERT_FILE)", problem });
    }
    Ok(found)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// A header as text.
pub(crate) fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// What went wrong, without an address in it.
pub(crate) fn reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::BadUri(_) => "an address is none".to_owned(),
        error => error.to_string(),
    }
}
