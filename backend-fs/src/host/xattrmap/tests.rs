//! Tests of the attribute rules: the documented examples, misuse with positions, and a naive model.

use proptest::prelude::*;

use super::*;

fn map(text: &str) -> XattrMap {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn to_host(map: &XattrMap, name: &str) -> Result<String, &'static str> {
    match map.to_host(&c(name)) {
        ToHost::Name(name) => Ok(name.to_str().unwrap().to_owned()),
        ToHost::Denied => Err("EPERM"),
        ToHost::Unsupported => Err("EOPNOTSUPP"),
    }
}

fn to_dpu(map: &XattrMap, name: &str) -> Option<String> {
    map.to_dpu(&c(name)).map(|name| name.to_str().unwrap().to_owned())
}

#[test]
fn no_rules_pass_everything_through() {
    let map = XattrMap::default();
    assert_eq!(to_host(&map, "user.a"), Ok("user.a".into()));
    assert_eq!(to_dpu(&map, "trusted.b"), Some("trusted.b".into()));
    assert!(map.is_terminated());
}

#[test]
fn every_attribute_can_live_under_a_prefix() {
    let map = map(":prefix:all::user.virtiofs.::bad:all:::");
    assert_eq!(to_host(&map, "security.selinux"), Ok("user.virtiofs.security.selinux".into()));
    assert_eq!(to_dpu(&map, "user.virtiofs.security.selinux"), Some("security.selinux".into()));
    assert_eq!(to_dpu(&map, "user.host"), None);
}

#[test]
fn some_attributes_can_be_renamed_and_their_target_protected() {
    let map = map("/prefix/all/trusted./user.virtiofs./
         /bad/server//trusted./
         /bad/client/user.virtiofs.//
         /ok/all///");
    assert_eq!(to_host(&map, "trusted.x"), Ok("user.virtiofs.trusted.x".into()));
    assert_eq!(to_host(&map, "user.virtiofs.trusted.x"), Err("EPERM"));
    assert_eq!(to_host(&map, "user.y"), Ok("user.y".into()));
    assert_eq!(to_dpu(&map, "user.virtiofs.trusted.x"), Some("trusted.x".into()));
    assert_eq!(to_dpu(&map, "trusted.host"), None);
    assert_eq!(to_dpu(&map, "user.y"), Some("user.y".into()));
}

#[test]
fn map_stands_for_its_documented_rules() {
    assert_eq!(map(":map::user.virtiofs.:"), map(":prefix:all::user.virtiofs.::bad:all:::"));
    assert_eq!(
        map(" /map/trusted./user.virtiofs./ "),
        map("/prefix/all/trusted./user.virtiofs./ /bad/all/user.virtiofs./trusted./ /ok/all///")
    );
    assert_eq!(
        map(":ok:client:user.::\n:map:security.:trusted.virtiofs.:"),
        map(":ok:client:user.::
             :prefix:all:security.:trusted.virtiofs.::bad:all:trusted.virtiofs.:security.::ok:all:::")
    );
}

#[test]
fn the_first_matching_rule_decides() {
    let map =
        map(":unsupported:all:security.selinux:security.selinux::bad:all:security.:security.::ok:all:::");
    assert_eq!(to_host(&map, "security.selinux"), Err("EOPNOTSUPP"));
    assert_eq!(to_host(&map, "security.ima"), Err("EPERM"));
    assert_eq!(to_dpu(&map, "security.selinux"), None);
    assert_eq!(to_host(&map, "user.a"), Ok("user.a".into()));
}

#[test]
fn scope_limits_a_rule_to_one_direction() {
    let map = map(":prefix:client:a.:b.::bad:server::a.::ok:all:::");
    assert_eq!(to_host(&map, "a.x"), Ok("b.a.x".into()));
    assert_eq!(to_dpu(&map, "b.a.x"), Some("b.a.x".into()));
    assert_eq!(to_dpu(&map, "a.x"), None);
}

#[test]
fn names_that_no_rule_matches_are_refused_and_hidden() {
    let map = map(":ok:all:user.:user.:");
    assert!(!map.is_terminated());
    assert_eq!(to_host(&map, "trusted.x"), Err("EPERM"));
    assert_eq!(to_dpu(&map, "trusted.x"), None);
    assert!(!super::tests::map(":ok:client:::").is_terminated());
    assert!(super::tests::map(":ok:client::: :bad:server:::").is_terminated());
}

#[test]
fn a_name_that_would_become_empty_is_hidden() {
    assert_eq!(to_dpu(&map(":prefix:all::user.virtiofs.:"), "user.virtiofs."), None);
}

#[test]
fn any_character_separates() {
    let expected = map(":prefix:all:k:p:");
    for text in ["/prefix/all/k/p/", "|prefix|all|k|p|", "→prefix→all→k→p→", ",prefix,all,k,p, "] {
        assert_eq!(map(text), expected, "{text}");
    }
}

#[test]
fn malformed_rules_are_reported_with_their_position() {
    let error = |text: &str| text.parse::<XattrMap>().unwrap_err().to_string();
    let empty = "rule 1, column 1: no rule; write ':type:scope:key:prepend:' or ':map:key:prepend:'";
    assert_eq!(error(""), empty);
    assert_eq!(error(" \n\t"), empty);
    assert_eq!(
        error(":ok:all:::  :tomato:all:::"),
        "rule 2, column 14: unknown type 'tomato' (prefix, ok, bad, unsupported, map)"
    );
    assert_eq!(
        error("/prefix/helloworld///"),
        "rule 1, column 9: unknown scope 'helloworld' (all, client, server)"
    );
    assert_eq!(
        error(":prefix:client:hi"),
        "rule 1, column 16: the key is not ended by the rule's separator ':'"
    );
    assert_eq!(
        error(":prefix:all:trusted.:user.vm."),
        "rule 1, column 22: the prepend field is not ended by the rule's separator ':'"
    );
    assert_eq!(error(":ok:all:::/"), "rule 2, column 12: the type is not ended by the rule's separator '/'");
    let after_map = "rule 1, column 31: 'map' must be the last rule; it covers every name itself";
    assert_eq!(error(":map:trusted.:virtiofs.user.: :map:a:b:"), after_map);
    assert_eq!(error(":ok:all:a\0b::"), "rule 1, column 10: a NUL character");
}

/// A rule in pieces: action, scope, key, prepend.
type Pieces = (&'static str, &'static str, String, String);

fn pieces() -> impl Strategy<Value = Pieces> {
    (
        prop::sample::select(vec!["prefix", "ok", "bad", "unsupported"]),
        prop::sample::select(vec!["all", "client", "server"]),
        "[ab]{0,2}",
        "[ab]{0,2}",
    )
}

fn write_rules(rules: &[Pieces]) -> String {
    let write = |(action, scope, key, prepend): &Pieces| format!(":{action}:{scope}:{key}:{prepend}: ");
    rules.iter().map(write).collect()
}

proptest! {
    #[test]
    fn mapping_agrees_with_walking_the_rules(rules in prop::collection::vec(pieces(), 1..5), name in "[abc]{1,4}") {
        let map = map(&write_rules(&rules));

        let mut expected = Err("EPERM");
        for (action, scope, key, prepend) in &rules {
            if *scope != "server" && name.starts_with(key.as_str()) {
                expected = match *action {
                    "prefix" => Ok(format!("{prepend}{name}")),
                    "ok" => Ok(name.clone()),
                    "bad" => Err("EPERM"),
                    _ => Err("EOPNOTSUPP"),
                };
                break;
            }
        }
        prop_assert_eq!(to_host(&map, &name), expected);

        let mut expected = None;
        for (action, scope, _, prepend) in &rules {
            if *scope != "client" && name.starts_with(prepend.as_str()) {
                expected = match *action {
                    "prefix" => name.strip_prefix(prepend.as_str()).filter(|rest| !rest.is_empty()),
                    "ok" => Some(name.as_str()),
                    _ => None,
                };
                break;
            }
        }
        prop_assert_eq!(to_dpu(&map, &name), expected.map(str::to_owned));
    }

    #[test]
    fn a_map_rule_gives_back_the_names_it_took(key in "[a-c.]{0,3}", prepend in "[a-c.]{1,4}", name in "[a-c.]{1,6}") {
        let map = map(&format!(":map:{key}:{prepend}:"));
        if let Ok(host) = to_host(&map, &name) && host != name {
            prop_assert_eq!(to_dpu(&map, &host), Some(name));
        }
    }

    #[test]
    fn terminated_rules_leave_no_name_unmatched(rules in prop::collection::vec(pieces(), 0..4)) {
        let text = write_rules(&rules) + ":ok:all:::";
        prop_assert!(map(&text).is_terminated());
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,40}|[: a-z]{0,40}") {
        let _ = text.parse::<XattrMap>();
    }
}
