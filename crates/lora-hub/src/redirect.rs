//! Where an answer sends us, and who may see the token.

use ureq::http::Uri;

/// Scheme, host and port: who is talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    scheme: String,
    host: String,
    port: Option<u16>,
}

impl Origin {
    pub(crate) fn of(address: &str) -> Option<Self> {
        let uri: Uri = address.parse().ok()?;
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let usual = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let port = uri.port_u16().filter(|port| *port != usual);
        Some(Self { host: uri.host()?.to_ascii_lowercase(), scheme, port })
    }

    pub(crate) fn is_secure(&self) -> bool {
        self.scheme == "https"
    }

    /// As a message names it.
    pub(crate) fn shown(&self) -> String {
        self.port.map_or_else(|| self.host.clone(), |port| format!("{}:{port}", self.host))
    }

    fn root(&self) -> String {
        format!("{}://{}", self.scheme, self.shown())
    }
}

/// The address that a `Location` means, seen from `at`. A way from https back to http is none.
pub(crate) fn target(at: &str, location: &str) -> Option<String> {
    let here = Origin::of(at)?;
    let location = location.split('#').next().unwrap_or_default();
    let address = if let Some(rest) = location.strip_prefix("//") {
        format!("{}://{rest}", here.scheme)
    } else if location.starts_with('/') {
        here.root() + location
    } else if location.contains("://") {
        location.to_owned()
    } else {
        let path = at.split('?').next().unwrap_or_default();
        format!("{}/{location}", path.rsplit_once('/')?.0)
    };
    let there = Origin::of(&address)?;
    (there.is_secure() || !here.is_secure()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved() {
        let at = "https://hub.example/a/b?x=1";
        let of = |location: &str| target(at, location);
        assert_eq!(of("/c?y=2").as_deref(), Some("https://hub.example/c?y=2"));
        assert_eq!(of("c").as_deref(), Some("https://hub.example/a/c"));
        assert_eq!(of("//cdn.example/c").as_deref(), Some("https://cdn.example/c"));
        assert_eq!(of("https://cdn.example:8443/c#f").as_deref(), Some("https://cdn.example:8443/c"));
        for bad in ["http://hub.example/c", "file:///etc/passwd", "ftp://x/y", "https://"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn another_port_or_scheme_is_another_origin() {
        let same = |a: &str, b: &str| Origin::of(a) == Origin::of(b);
        assert!(same("https://Hub.example/x", "https://hub.example:443/y"));
        assert!(!same("https://hub.example", "http://hub.example"));
        assert!(!same("http://127.0.0.1:1", "http://127.0.0.1:2"));
        assert!(!same("https://hub.example", "https://hub.example.evil"));
        assert_eq!(Origin::of("https://user@hub.example/x").map(|o| o.shown()), Some("hub.example".into()));
    }
}
