//! Rules that rename or refuse extended attributes (`--xattrmap`).
//!
//! A rule is `:type:scope:key:prepend:`. Its first character separates the fields; white space may
//! stand between rules. The first rule that matches a name decides:
//!
//! | Type | A name from the DPU that starts with `key` | A host name that starts with `prepend` |
//! |---|---|---|
//! | `prefix` | gets `prepend` in front | loses `prepend` |
//! | `ok` | is used as it is | is shown as it is |
//! | `bad` | is refused with `EPERM` | is hidden |
//! | `unsupported` | is refused with `EOPNOTSUPP` | is hidden |
//!
//! Scope `client` limits a rule to names from the DPU (set, get, remove), `server` to host names
//! (listings); `all` is both. `:map:key:prepend:` stands for the usual set of rules and comes last.
//!
//! A rule set should end with one that matches everything (`:ok:all:::`, `:bad:all:::`, `:map:…`).
//! virtiofsd aborts on the first name that no rule matches. Here such a name is refused and hidden:
//! what nobody allowed is not allowed.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::fmt;
use std::iter::Peekable;
use std::str::{CharIndices, FromStr};

/// An ordered list of rules. The default passes every name through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XattrMap {
    rules: Vec<Rule>,
}

/// What becomes of a name the DPU uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost<'a> {
    /// Use this name on the host.
    Name(Cow<'a, CStr>),
    /// Refuse with `EPERM`; a read of it finds nothing (`ENODATA`), as virtiofsd answers.
    Denied,
    /// Refuse with `EOPNOTSUPP`.
    Unsupported,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    action: Action,
    scope: Scope,
    key: Vec<u8>,
    prepend: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Prefix,
    Ok,
    Bad,
    Unsupported,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    All,
    Client,
    Server,
}

impl XattrMap {
    /// The host name for a name the DPU gave.
    pub fn to_host<'a>(&self, dpu_name: &'a CStr) -> ToHost<'a> {
        let name = dpu_name.to_bytes();
        let mut rules = self.rules.iter().filter(|rule| rule.scope != Scope::Server);
        match rules.find(|rule| name.starts_with(&rule.key)) {
            Some(Rule { action: Action::Ok, .. }) => ToHost::Name(Cow::Borrowed(dpu_name)),
            Some(Rule { action: Action::Unsupported, .. }) => ToHost::Unsupported,
            Some(Rule { action: Action::Bad, .. }) => ToHost::Denied,
            Some(Rule { action: Action::Prefix, prepend, .. }) => {
                // Neither part contains a NUL: the parser refuses it in rules, `CStr` rules it out.
                CString::new([prepend, name].concat())
                    .map_or(ToHost::Denied, |name| ToHost::Name(Cow::Owned(name)))
            }
            None if self.rules.is_empty() => ToHost::Name(Cow::Borrowed(dpu_name)),
            None => ToHost::Denied,
        }
    }

    /// The name the DPU sees for a host name in a listing; `None` hides it.
    pub fn to_dpu<'a>(&self, host_name: &'a CStr) -> Option<Cow<'a, CStr>> {
        let name = host_name.to_bytes();
        let mut rules = self.rules.iter().filter(|rule| rule.scope != Scope::Client);
        match rules.find(|rule| name.starts_with(&rule.prepend)) {
            Some(Rule { action: Action::Ok, .. }) => Some(Cow::Borrowed(host_name)),
            Some(Rule { action: Action::Bad | Action::Unsupported, .. }) => None,
            Some(Rule { action: Action::Prefix, prepend, .. }) => {
                let rest = host_name.to_bytes_with_nul().get(prepend.len()..)?;
                let rest = CStr::from_bytes_with_nul(rest).ok()?;
                (!rest.is_empty()).then_some(Cow::Borrowed(rest))
            }
            None if self.rules.is_empty() => Some(Cow::Borrowed(host_name)),
            None => None,
        }
    }

    /// Whether every name is matched by some rule in both directions.
    pub fn is_terminated(&self) -> bool {
        let any = |scope, empty: fn(&Rule) -> bool| {
            self.rules.iter().any(|rule| rule.scope != scope && empty(rule))
        };
        self.rules.is_empty()
            || any(Scope::Server, |rule| rule.key.is_empty())
                && any(Scope::Client, |rule| rule.prepend.is_empty())
    }
}

/// Why a rule set was refused, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {rule}, column {column}: {kind}")]
pub struct ParseError {
    /// Number of the rule, from 1.
    pub rule: usize,
    /// Column of the offending field in the whole text, in characters from 1.
    pub column: usize,
    /// What is wrong.
    pub kind: ParseErrorKind,
}

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseErrorKind {
    /// Nothing but white space.
    #[error("no rule; write ':type:scope:key:prepend:' or ':map:key:prepend:'")]
    Empty,
    /// First field.
    #[error("unknown type '{0}' (prefix, ok, bad, unsupported, map)")]
    Type(String),
    /// Second field.
    #[error("unknown scope '{0}' (all, client, server)")]
    Scope(String),
    /// The text ends inside a rule.
    #[error("the {field} is not ended by the rule's separator '{separator}'")]
    Unfinished {
        /// The field the text ends in.
        field: Field,
        /// First character of the rule.
        separator: char,
    },
    /// Something follows `map`.
    #[error("'map' must be the last rule; it covers every name itself")]
    AfterMap,
    /// Attribute names cannot contain it.
    #[error("a NUL character")]
    Nul,
}

/// A field of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in the syntax")]
pub enum Field {
    Type,
    Scope,
    Key,
    Prepend,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Field::Type => "type",
            Field::Scope => "scope",
            Field::Key => "key",
            Field::Prepend => "prepend field",
        })
    }
}

impl FromStr for XattrMap {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parser = Parser { text, rest: text.char_indices().peekable(), rule: 1 };
        let mut rules = Vec::new();
        parser.skip_space();
        if parser.rest.peek().is_none() || text.contains('\0') {
            let kind = if text.contains('\0') { ParseErrorKind::Nul } else { ParseErrorKind::Empty };
            return Err(parser.error(text.find('\0').unwrap_or(0), kind));
        }
        while let Some((_, separator)) = parser.rest.next() {
            let (at, action) = parser.field(separator, Field::Type)?;
            let action = match action {
                "prefix" => Action::Prefix,
                "ok" => Action::Ok,
                "bad" => Action::Bad,
                "unsupported" => Action::Unsupported,
                "map" => {
                    let (_, key) = parser.field(separator, Field::Key)?;
                    let (_, prepend) = parser.field(separator, Field::Prepend)?;
                    parser.skip_space();
                    if let Some(&(next, _)) = parser.rest.peek() {
                        return Err(parser.error(next, ParseErrorKind::AfterMap));
                    }
                    rules.extend(expand_map(key, prepend));
                    break;
                }
                other => return Err(parser.error(at, ParseErrorKind::Type(other.to_owned()))),
            };
            let scope = match parser.field(separator, Field::Scope)? {
                (_, "all") => Scope::All,
                (_, "client") => Scope::Client,
                (_, "server") => Scope::Server,
                (at, other) => return Err(parser.error(at, ParseErrorKind::Scope(other.to_owned()))),
            };
            let (_, key) = parser.field(separator, Field::Key)?;
            let (_, prepend) = parser.field(separator, Field::Prepend)?;
            rules.push(Rule { action, scope, key: key.into(), prepend: prepend.into() });
            parser.skip_space();
            parser.rule += 1;
        }
        Ok(Self { rules })
    }
}

/// The rules `:map:key:prepend:` stands for.
fn expand_map(key: &str, prepend: &str) -> Vec<Rule> {
    let rule = |action, key: &str, prepend: &str| Rule {
        action,
        scope: Scope::All,
        key: key.into(),
        prepend: prepend.into(),
    };
    if key.is_empty() {
        // Everything is renamed; what the host has under other names is hidden.
        return vec![rule(Action::Prefix, "", prepend), rule(Action::Bad, "", "")];
    }
    vec![
        rule(Action::Prefix, key, prepend),
        // The DPU may not reach renamed attributes by their host names, nor see the host's own `key`.
        rule(Action::Bad, prepend, key),
        rule(Action::Ok, "", ""),
    ]
}

struct Parser<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
    /// Number of the rule being read.
    rule: usize,
}

impl<'a> Parser<'a> {
    fn skip_space(&mut self) {
        while self.rest.next_if(|(_, c)| c.is_ascii_whitespace()).is_some() {}
    }

    /// The text up to the next separator, which is taken as well, and where it starts.
    fn field(&mut self, separator: char, field: Field) -> Result<(usize, &'a str), ParseError> {
        let start = self.rest.peek().map_or(self.text.len(), |&(at, _)| at);
        match self.rest.by_ref().find(|&(_, c)| c == separator) {
            Some((end, _)) => Ok((start, &self.text[start..end])),
            None => Err(self.error(start, ParseErrorKind::Unfinished { field, separator })),
        }
    }

    fn error(&self, at: usize, kind: ParseErrorKind) -> ParseError {
        let column = self.text[..at].chars().count() + 1;
        ParseError { rule: self.rule, column, kind }
    }
}

#[cfg(test)]
mod tests;
