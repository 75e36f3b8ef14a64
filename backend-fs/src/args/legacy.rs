//! The option format of the first virtiofsd: `-o source=DIR,cache=auto,no_flock`, and `-d`.
//!
//! Everything here becomes modern options that are appended to the command line and parsed with it.
//! So a legacy option has the checks and the messages of its modern twin. It wins over a modern one wherever
//! that stands, as in virtiofsd, and `-d` wins over any log level.
#![forbid(unsafe_code)]

/// Why an `-o` was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such key, or one with a value where none belongs or the other way round.
    #[error("-o {0}: unknown option; see -o in --help")]
    Unknown(String),
    /// The value is not one of the key's.
    #[error("-o {key}={value}: invalid value ({expected})")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
}

/// The modern options that say the same as these legacy ones. `lists` are the arguments of `-o`.
pub fn modern(lists: &[String], debug: bool) -> Result<Vec<String>, Error> {
    let mut options = Vec::new();
    let mut locks = Locks::default();
    for item in lists.iter().flat_map(|list| list.split(',')) {
        match item.split_once('=') {
            Some((key, value)) => options.push(with_value(key, value)?),
            None => match locks.take(item) {
                true => {}
                false => options.push(flag(item)?.to_owned()),
            },
        }
    }
    options.extend(locks.modern().map(str::to_owned));
    if debug {
        options.push("--log-level=debug".into());
    }
    Ok(options)
}

fn with_value(key: &str, value: &str) -> Result<String, Error> {
    let error = |expected| Error::Value { key: key.to_owned(), value: value.to_owned(), expected };
    Ok(match key {
        "source" => format!("--shared-dir={value}"),
        "modcaps" => format!("--modcaps={value}"),
        "xattrmap" => format!("--xattrmap={value}"),
        "cache" => match value {
            "auto" | "always" | "metadata" => format!("--cache={value}"),
            "none" => "--cache=never".into(),
            _ => return Err(error("auto, always, metadata, none")),
        },
        "loglevel" => match value {
            "debug" | "info" | "warn" => format!("--log-level={value}"),
            "err" => "--log-level=error".into(),
            _ => return Err(error("debug, info, warn, err")),
        },
        "sandbox" => match value {
            "namespace" | "chroot" => format!("--sandbox={value}"),
            _ => return Err(error("namespace, chroot")),
        },
        _ => return Err(Error::Unknown(format!("{key}={value}"))),
    })
}

fn flag(item: &str) -> Result<&'static str, Error> {
    Ok(match item {
        "xattr" => "--xattr",
        "no_xattr" => "--no-xattr",
        "readdirplus" => "--readdirplus",
        "no_readdirplus" => "--no-readdirplus",
        "writeback" => "--writeback",
        "no_writeback" => "--no-writeback",
        "allow_direct_io" => "--allow-direct-io",
        "no_allow_direct_io" => "--no-allow-direct-io",
        "announce_submounts" => "--announce-submounts",
        "killpriv_v2" => "--killpriv-v2",
        "no_killpriv_v2" => "--no-killpriv-v2",
        "posix_acl" => "--posix-acl=always",
        "no_posix_acl" => "--posix-acl=never",
        "security_label" => "--security-label=always",
        "no_security_label" => "--security-label=never",
        _ => return Err(Error::Unknown(item.to_owned())),
    })
}

/// The two kinds of locks that `-o` knows apart. Here they are forwarded to the host together, and
/// whoever asked for one of them to stay inside the DPU gets that for both.
#[derive(Default)]
struct Locks {
    posix: Option<bool>,
    flock: Option<bool>,
}

impl Locks {
    /// Whether `item` was about locks.
    fn take(&mut self, item: &str) -> bool {
        match item {
            "posix_lock" => self.posix = Some(true),
            "no_posix_lock" => self.posix = Some(false),
            "flock" => self.flock = Some(true),
            "no_flock" => self.flock = Some(false),
            _ => return false,
        }
        true
    }

    fn modern(&self) -> Option<&'static str> {
        match (self.posix, self.flock) {
            (None, None) => None,
            (Some(false), _) | (_, Some(false)) => Some("--no-host-locks"),
            _ => Some("--host-locks"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(lists: &[&str]) -> Result<Vec<String>, Error> {
        let lists: Vec<String> = lists.iter().map(|&list| list.into()).collect();
        modern(&lists, false)
    }

    #[test]
    fn keys_with_values_become_options_with_values() {
        assert_eq!(
            rewritten(&[
                "source=/a=b,cache=none,loglevel=err",
                "sandbox=chroot",
                "modcaps=+sys_admin:-chown"
            ])
            .unwrap(),
            [
                "--shared-dir=/a=b",
                "--cache=never",
                "--log-level=error",
                "--sandbox=chroot",
                "--modcaps=+sys_admin:-chown"
            ]
        );
        assert_eq!(
            rewritten(&["xattrmap=:map::user.virtiofs.:"]).unwrap(),
            ["--xattrmap=:map::user.virtiofs.:"]
        );
    }

    #[test]
    fn flags_become_options_in_their_order() {
        assert_eq!(
            rewritten(&["xattr,no_xattr,posix_acl,no_security_label"]).unwrap(),
            ["--xattr", "--no-xattr", "--posix-acl=always", "--security-label=never"]
        );
    }

    #[test]
    fn one_kind_of_lock_inside_the_dpu_means_both() {
        for (given, expected) in [
            ("no_posix_lock,no_flock", "--no-host-locks"),
            ("flock,no_posix_lock", "--no-host-locks"),
            ("no_flock,flock", "--host-locks"),
            ("posix_lock", "--host-locks"),
        ] {
            assert_eq!(rewritten(&[given]).unwrap(), [expected], "{given}");
        }
    }

    #[test]
    fn debug_comes_last() {
        let options = modern(&["loglevel=warn".into()], true).unwrap();
        assert_eq!(options, ["--log-level=warn", "--log-level=debug"]);
    }

    #[test]
    fn unknown_keys_and_values_are_refused() {
        for (given, named) in [
            ("nonsense", "nonsense"),
            ("xattr,", ""),
            ("", ""),
            ("xattr=1", "xattr=1"),
            ("source", "source"),
            ("timeout=5", "timeout=5"),
            ("no_announce_submounts", "no_announce_submounts"),
        ] {
            assert_eq!(rewritten(&[given]), Err(Error::Unknown(named.into())), "{given}");
        }
        for (key, value) in [("cache", "never"), ("loglevel", "trace"), ("sandbox", "none"), ("cache", "")] {
            let error = rewritten(&[&format!("{key}={value}")]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("-o {key}={value}: invalid value (")), "{error}");
        }
    }
}
