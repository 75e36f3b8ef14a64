//! Tests of the id translation: the documented examples, misuse, and a naive model.

use proptest::prelude::*;

use super::*;

fn map(rules: &[&str]) -> IdMap {
    let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    IdMap::new(&rules).unwrap()
}

#[test]
fn an_empty_map_is_the_identity() {
    let map = map(&[]);
    assert!(map.is_identity());
    assert_eq!((map.to_host(1000), map.to_dpu(1000)), (Some(1000), 1000));
}

#[test]
fn the_no_id_value_is_never_a_host_id() {
    assert_eq!(map(&[]).to_host(NO_ID), None);
    assert_eq!(map(&["squash-guest:0:107:4294967295"]).to_host(NO_ID), None);
}

#[test]
fn directions_are_independent() {
    let dpu = map(&["guest:0:1000:10"]);
    assert_eq!((dpu.to_host(9), dpu.to_host(10), dpu.to_dpu(1009)), (Some(1009), Some(10), 1009));
    let host = map(&["host:1000:0:10"]);
    assert_eq!((host.to_host(9), host.to_dpu(1009), host.to_dpu(1010)), (Some(9), 9, 1010));
    let both = map(&["map:0:1000:10"]);
    assert_eq!((both.to_host(9), both.to_dpu(1009)), (Some(1009), 9));
}

/// An unprivileged daemon that can only be 1001:100, with its files shown as 1000:1000.
#[test]
fn everything_is_squashed_to_one_host_id_and_shown_as_another() {
    let map = map(&["squash-guest:0:1001:4294967295", "host:1001:1000:1"]);
    assert_eq!(map.to_host(0), Some(1001));
    assert_eq!(map.to_host(4_294_967_294), Some(1001));
    assert_eq!((map.to_dpu(1001), map.to_dpu(0)), (1000, 0));
}

#[test]
fn squashed_host_ids_are_shown_as_one() {
    let map = map(&["squash-host:100000:65534:65536"]);
    assert_eq!((map.to_dpu(99_999), map.to_dpu(100_000), map.to_dpu(165_535)), (99_999, 65534, 65534));
    assert_eq!(map.to_host(65534), Some(65534));
}

/// What Incus passes for an idmapped container.
#[test]
fn ids_outside_the_mapped_range_can_be_forbidden() {
    let map = map(&["map:0:1000000:65536", "forbid-guest:65536:4294901759"]);
    assert_eq!((map.to_host(0), map.to_host(65535)), (Some(1_000_000), Some(1_065_535)));
    assert_eq!((map.to_host(65536), map.to_host(4_294_967_294)), (None, None));
    assert_eq!(map.to_dpu(1_000_001), 1);
}

#[test]
fn separator_and_case_of_the_kind_are_free() {
    let expected = Ok(Rule::Both(Range { from: 1, to: 2, count: 3 }));
    for text in ["map:1:2:3", "MAP/1/2/3", "map 1 2 3"] {
        assert_eq!(text.parse(), expected, "{text}");
    }
}

#[test]
fn malformed_rules_say_what_is_wrong() {
    let error = |text: &str| text.parse::<Rule>().unwrap_err().to_string();
    let unknown = "unknown kind '' (guest, host, squash-guest, squash-host, forbid-guest, map)";
    assert_eq!(error(""), unknown);
    assert_eq!(error(":1:2:3"), unknown);
    assert!(error("squash:1:2:3").starts_with("unknown kind 'squash'"));
    assert_eq!(error("map"), "'map' takes 3 numbers, as in 'map:0:100000:65536'; found 0");
    assert_eq!(error("map:1:2"), "'map' takes 3 numbers, as in 'map:0:100000:65536'; found 2");
    assert!(error("forbid-guest:1:2:3").starts_with("'forbid-guest' takes 2 numbers"));
    assert_eq!(error("map:1:2/3"), "'2/3' is not a number from 0 to 4294967295");
    assert_eq!(error("map:1:2:-3"), "'-3' is not a number from 0 to 4294967295");
    assert_eq!(error("map:1:2:"), "'' is not a number from 0 to 4294967295");
}

#[test]
fn ranges_that_reach_the_no_id_value_are_refused() {
    for (text, base, count) in [
        ("guest:4294967295:0:1", 4_294_967_295, 1),
        ("guest:0:4294967295:1", 4_294_967_295, 1),
        ("map:0:1:4294967295", 1, 4_294_967_295),
        ("squash-guest:0:4294967295:1", 4_294_967_295, 1),
        ("forbid-guest:2:4294967294", 2, 4_294_967_294),
    ] {
        assert_eq!(text.parse::<Rule>(), Err(RuleError::Overflow { base, count }), "{text}");
    }
    assert!("squash-guest:0:4294967294:4294967295".parse::<Rule>().is_ok());
}

#[test]
fn overlapping_rules_are_named_in_the_order_given() {
    let rules: Vec<Rule> = ["map:10:20:5", "forbid-guest:0:11"].iter().map(|r| r.parse().unwrap()).collect();
    assert_eq!(
        IdMap::new(&rules).unwrap_err().to_string(),
        "'forbid-guest:0:11' overlaps 'map:10:20:5'; a DPU id may be named by one rule only"
    );
    let rules: Vec<Rule> = ["map:10:20:5", "squash-host:24:1:1"].iter().map(|r| r.parse().unwrap()).collect();
    assert!(IdMap::new(&rules).unwrap_err().to_string().contains("a host id"));
}

#[test]
fn neighbours_and_empty_rules_do_not_overlap() {
    let map = map(&["guest:0:100:10", "guest:10:200:10", "forbid-guest:5:0"]);
    assert_eq!((map.to_host(9), map.to_host(10)), (Some(109), Some(200)));
}

/// Rules over a small domain, so that they meet often.
fn rule() -> impl Strategy<Value = Rule> {
    let range = (0u32..24, 0u32..24, 0u32..6).prop_map(|(from, to, count)| Range { from, to, count });
    prop_oneof![
        range.clone().prop_map(Rule::Dpu),
        range.clone().prop_map(Rule::Host),
        range.clone().prop_map(Rule::SquashDpu),
        range.clone().prop_map(Rule::SquashHost),
        range.clone().prop_map(Rule::Both),
        range.prop_map(|Range { from, count, .. }| Rule::ForbidDpu { from, count }),
    ]
}

/// What a rule makes of a DPU id, id by id; the outer `None`: the rule does not name it.
fn model_to_host(rule: &Rule, id: u32) -> Option<Option<u32>> {
    let named = |from: u32, count: u32| (from..from + count).contains(&id);
    match *rule {
        Rule::Dpu(r) | Rule::Both(r) if named(r.from, r.count) => Some(Some(r.to + (id - r.from))),
        Rule::SquashDpu(r) if named(r.from, r.count) => Some(Some(r.to)),
        Rule::ForbidDpu { from, count } if named(from, count) => Some(None),
        _ => None,
    }
}

fn model_to_dpu(rule: &Rule, id: u32) -> Option<u32> {
    let named = |from: u32, count: u32| (from..from + count).contains(&id);
    match *rule {
        Rule::Host(r) if named(r.from, r.count) => Some(r.to + (id - r.from)),
        Rule::Both(r) if named(r.to, r.count) => Some(r.from + (id - r.to)),
        Rule::SquashHost(r) if named(r.from, r.count) => Some(r.to),
        _ => None,
    }
}

proptest! {
    #[test]
    fn translation_agrees_with_asking_every_rule_for_every_id(rules in prop::collection::vec(rule(), 0..6)) {
        let ids = 0..64u32;
        let ambiguous = ids.clone().any(|id| {
            rules.iter().filter(|rule| model_to_host(rule, id).is_some()).count() > 1
                || rules.iter().filter(|rule| model_to_dpu(rule, id).is_some()).count() > 1
        });
        match IdMap::new(&rules) {
            Err(_) => prop_assert!(ambiguous),
            Ok(map) => {
                prop_assert!(!ambiguous);
                for id in ids {
                    let to_host = rules.iter().find_map(|rule| model_to_host(rule, id)).unwrap_or(Some(id));
                    let to_dpu = rules.iter().find_map(|rule| model_to_dpu(rule, id)).unwrap_or(id);
                    prop_assert_eq!(map.to_host(id), to_host);
                    prop_assert_eq!(map.to_dpu(id), to_dpu);
                }
            }
        }
    }

    #[test]
    fn rules_are_read_as_they_are_printed(rule in rule()) {
        prop_assert_eq!(rule.to_string().parse(), Ok(rule));
    }

    #[test]
    fn no_text_panics_and_no_rule_makes_the_no_id_value(
        text in "(guest|host|map|squash-guest|squash-host|forbid-guest)?[:/]?([0-9]{1,10}[:/]?){0,4}",
        id in any::<u32>(),
    ) {
        if let Ok(rule) = text.parse::<Rule>() {
            let map = IdMap::new(&[rule]).unwrap();
            prop_assert_ne!(map.to_host(id), Some(NO_ID));
            prop_assert!(id == NO_ID || map.to_dpu(id) != NO_ID);
        }
    }
}
