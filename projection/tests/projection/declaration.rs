//! What a domain may declare, and how its events and commands are read and written.

use consistency::{AggregateId, Name, PartitionCount, SchemaVersion};
use projection::{
    Changes, Command, CommandError, Domain, DomainError, FoldError, Folded, Found, Projection,
    SearchFields, Stop, StoredState,
};
use schemars::{JsonSchema, SchemaGenerator};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::notes::{NoteCount, NoteEvent, Notes, declared, event, note, notes};

fn domain(projection: Projection) -> Result<Domain, DomainError> {
    Domain::builder().aggregate("note", Notes).projection(projection).build()
}

fn mistakes(projection: Projection) -> Vec<String> {
    domain(projection).map_or_else(|error| error.mistakes().to_vec(), |_| Vec::new())
}

#[test]
fn tables_are_named_after_projection_version_and_view() {
    let tables: Vec<String> = notes().statements().tables().map(str::to_owned).collect();
    assert_eq!(
        tables,
        ["notes_v1_state", "notes_v1_note", "notes_v1_notes_by_owner", "notes_v1_pinned"]
    );
}

#[test]
fn mistakes_are_reported_together() {
    let bad = Projection::document("no tes", 0, "note", Notes).partitions(0).sum("total");
    let said = mistakes(bad).join("\n");
    for part in ["no tes", "version 0", "0 partitions", "no view", "no column total"] {
        assert!(said.contains(part), "{part:?} in {said}");
    }
}

#[test]
fn names_that_would_share_a_table_are_refused() {
    let twins = Projection::document("notes", 1, "note", Notes).list("by-owner").list("by_owner");
    assert_eq!(mistakes(twins).len(), 1);
    let state = Projection::document("notes", 1, "note", Notes).row("state");
    assert_eq!(mistakes(state).len(), 1);
    let long = Projection::document(&"n".repeat(40), 1, "note", Notes).row(&"v".repeat(30));
    assert_eq!(mistakes(long).len(), 1, "the server would cut the name");
}

#[test]
fn a_later_field_is_of_a_view_with_rows_and_has_a_plain_name_of_its_own() {
    let notes = || Projection::document("notes", 1, "note", Notes).row("note");
    let value = |_: &serde_json::Map<String, Value>| Value::Null;
    assert_eq!(mistakes(notes().later("note", "length", value)), Vec::<String>::new());
    assert_eq!(mistakes(notes().later("unheard", "length", value)).len(), 1);
    assert_eq!(mistakes(notes().later("note", "a' b", value)).len(), 1);
    let twice = notes().later("note", "length", value).later("note", "length", value);
    assert_eq!(mistakes(twice).len(), 1);
    let count = Projection::rollup("count", 1, "note", "notes-written", NoteCount).sum("written");
    assert_eq!(mistakes(count.later("notes-written", "mean", value)).len(), 1);
}

#[test]
fn a_rollup_has_columns_with_plain_names_of_its_own() {
    let rollup = || Projection::rollup("count", 1, "note", "notes-written", NoteCount);
    assert_eq!(mistakes(rollup().sum("written").max("longest")), Vec::<String>::new());
    assert_eq!(mistakes(rollup()).len(), 1);
    for column in ["position", "a b", "a\"b", "", "Written"] {
        assert_eq!(mistakes(rollup().sum(column)).len(), 1, "{column:?}");
    }
    assert_eq!(mistakes(rollup().sum("written").max("written")).len(), 1);
    assert_eq!(mistakes(rollup().sum("written").list("notes")).len(), 1);
}

#[test]
fn a_search_names_plain_fields_of_its_rows() {
    let search = |words, number, label| {
        let fields = SearchFields { words, number, label };
        mistakes(Projection::document("notes", 1, "note", Notes).search("note-search", fields))
    };
    assert_eq!(search(&["owner"], "length", "owner"), Vec::<String>::new());
    assert_eq!(search(&[], "length", "owner").len(), 1);
    assert_eq!(search(&["owner'"], "Length", "").len(), 3);
    let long = "v".repeat(50);
    let fields = SearchFields { words: &["owner"], number: "length", label: "owner" };
    let notes = Projection::document("notes", 1, "note", Notes).search(&long, fields);
    assert_eq!(mistakes(notes).len(), 1, "the server would cut the index's name");
}

#[test]
fn versions_of_a_projection_stand_beside_each_other_and_two_of_one_do_not() {
    let both = Domain::builder().projection(declared(1)).projection(declared(2)).build().unwrap();
    assert_eq!(both.view("note").unwrap().0.version(), 2);
    assert_eq!(both.projection("notes", 1).unwrap().version(), 1);
    assert!(Domain::builder().projection(declared(1)).projection(declared(1)).build().is_err());
    let thief = Projection::document("others", 1, "note", Notes).row("note");
    assert!(Domain::builder().projection(declared(1)).projection(thief).build().is_err());
    let turned = Projection::document("notes", 2, "note", Notes).list("note");
    assert!(Domain::builder().projection(declared(1)).projection(turned).build().is_err());
}

fn rename_owner(mut data: Value) -> Result<Value, FoldError> {
    let holder = data.get_mut("holder").map(Value::take);
    Ok(json!({ "owner": holder.ok_or_else(|| FoldError::new("no holder"))? }))
}

fn unwrap_owner(mut data: Value) -> Result<Value, FoldError> {
    let holder = data.get_mut("people").and_then(|people| people.get_mut(0)).map(Value::take);
    Ok(json!({ "holder": holder.ok_or_else(|| FoldError::new("nobody"))? }))
}

#[test]
fn events_of_every_known_schema_decode_to_the_newest() {
    let domain = Domain::builder()
        .aggregate("note", Notes)
        .upcaster("Written", 1, unwrap_owner)
        .upcaster("Written", 2, rename_owner)
        .projection(declared(1))
        .build()
        .unwrap();
    let fold = |version, data| {
        let mut written = event(&note("n-1"), 1, 10, "Written", data);
        written.schema_version = SchemaVersion::new(version).unwrap();
        let aggregate = domain.aggregate("note").unwrap();
        let from_aggregate = aggregate.fold(Folded::nothing(), &written);
        let document = domain.projections()[0].document().unwrap();
        let kind = document.fold(Folded::nothing(), &written).err().map(|error| error.kind());
        assert_eq!(kind, from_aggregate.as_ref().err().map(|error| error.kind()));
        let state = from_aggregate.map_err(|error| error.kind())?;
        Ok(aggregate.state_json(&state).unwrap().unwrap().get().to_owned())
    };
    let ada: Result<String, &str> = Ok(r#"{"owner":"ada","pinned":false}"#.to_owned());
    assert_eq!(fold(1, r#"{"people":["ada"]}"#), ada);
    assert_eq!(fold(2, r#"{"holder":"ada"}"#), ada);
    assert_eq!(fold(3, r#"{"owner":"ada"}"#), ada);
    assert_eq!(fold(1, r#"{"people":[]}"#), Err("upcast"));
    assert_eq!(fold(1, "{"), Err("decode"));
    assert_eq!(fold(4, r#"{"owner":"ada"}"#), Err("unknown-schema-version"));
}

#[test]
fn rules_say_which_events_they_know_whatever_is_in_them() {
    let domain = Domain::builder()
        .aggregate("note", Notes)
        .upcaster("Written", 1, unwrap_owner)
        .projection(declared(1))
        .projection(Projection::rollup("counts", 1, "note", "count", NoteCount).sum("notes"))
        .build()
        .unwrap();
    for definition in domain.projections() {
        let knows = |event_type: &str, schema| {
            definition.knows(&Name::new(event_type).unwrap(), SchemaVersion::new(schema).unwrap())
        };
        assert!(knows("Written", 1) && knows("Written", 2), "{}", definition.name());
        assert!(!knows("Written", 3) && !knows("Shredded", 2), "{}", definition.name());
        // The one that counts takes whatever else there is for something that it does not count.
        assert_eq!(knows("Shredded", 1), definition.document().is_none(), "{}", definition.name());
    }
}

#[test]
fn an_upcaster_that_panics_is_poison_like_a_fold_that_does() {
    let domain = Domain::builder()
        .aggregate("note", Notes)
        .upcaster("Written", 1, |data| panic!("no upcaster expects {data}"))
        .projection(declared(1))
        .build()
        .unwrap();
    let written = event(&note("n-1"), 1, 10, "Written", r#"{"owner":"ada"}"#);
    let document = domain.projections()[0].document().unwrap();
    let applied = document.apply(&note("n-1"), StoredState::NOTHING, &[&written]);
    let Some(Stop::Poison(error)) = &applied.stop else { panic!("poison") };
    assert_eq!((error.kind(), applied.consumed), ("panic", 0));
}

#[test]
fn upcasters_are_given_in_order() {
    let skipping = Domain::builder().upcaster("Written", 2, rename_owner).build();
    assert!(skipping.is_err());
    let twice = Domain::builder().upcaster("Written", 1, rename_owner);
    assert!(twice.upcaster("Written", 1, rename_owner).build().is_err());
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct WriteNote {
    note_id: String,
    copy_of: Option<String>,
    pin: bool,
}

impl Command for WriteNote {
    const NAME: &'static str = "WriteNote";
    const AGGREGATE_TYPE: &'static str = "note";
    type Aggregate = Notes;

    fn aggregate_id(&self) -> &str {
        &self.note_id
    }

    fn lookups(&self) -> Vec<(&'static str, &str)> {
        self.copy_of.iter().flat_map(|id| [("note", id.as_str()), ("note", id)]).collect()
    }

    fn run(
        &self,
        state: Option<&crate::notes::Note>,
        found: &Found<'_>,
    ) -> Result<Vec<NoteEvent>, CommandError> {
        if state.is_some() {
            return Err(CommandError::rule("note-is-new", "there is such a note"));
        }
        let owner = match &self.copy_of {
            Some(id) => found
                .state::<crate::notes::Note>("note", id)
                .ok_or_else(|| CommandError::rule("note-exists", "nothing to copy"))?
                .owner
                .clone(),
            None => "ada".to_owned(),
        };
        let pin = self.pin.then_some(NoteEvent::Pinned);
        Ok(std::iter::once(NoteEvent::Written { owner }).chain(pin).collect())
    }
}

fn writing() -> Domain {
    Domain::builder()
        .aggregate("note", Notes)
        .command::<WriteNote>()
        .upcaster("Written", 1, rename_owner)
        .build()
        .unwrap()
}

#[test]
fn a_command_decides_on_the_states_that_it_asked_for() {
    let domain = writing();
    let command = domain.command("WriteNote").unwrap();
    let body = br#"{"note_id":"n-2","copy_of":"n-1","pin":true}"#;
    let prepared = command.prepare(body).unwrap();
    assert_eq!(prepared.target(), &note("n-2"));
    assert_eq!(prepared.lookups(), [note("n-1")], "each once");
    let mut written = event(&note("n-1"), 1, 10, "Written", r#"{"owner":"bob"}"#);
    written.schema_version = SchemaVersion::new(2).unwrap();
    let fold = |event| domain.aggregate("note").unwrap().fold(Folded::nothing(), event).unwrap();
    let copied = fold(&written);

    let events = prepared.run(&Folded::nothing(), &[copied]).unwrap();
    let texts: Vec<_> = events
        .iter()
        .map(|event| (event.event_type.as_str(), event.schema_version.get(), event.data.as_str()))
        .collect();
    assert_eq!(texts, [("Written", 2, r#"{"owner":"bob"}"#), ("Pinned", 1, "{}")]);

    let missing = prepared.run(&Folded::nothing(), &[Folded::nothing()]).unwrap_err();
    assert!(matches!(missing, CommandError::RuleViolated(broken) if broken.rule == "note-exists"));
    let exists = prepared.run(&fold(&written), &[Folded::nothing()]).unwrap_err();
    assert!(matches!(exists, CommandError::RuleViolated(broken) if broken.rule == "note-is-new"));
}

#[test]
fn a_malformed_command_is_told_from_a_broken_rule() {
    let domain = writing();
    let command = domain.command("WriteNote").unwrap();
    let bodies: [&[u8]; 6] = [
        b"",
        b"[]",
        br#"{"note_id":"n-2"}"#,
        br#"{"note_id":"n-2","pin":true,"colour":"red"}"#,
        br#"{"note_id":"a b","pin":true}"#,
        br#"{"note_id":"n-2","copy_of":"","pin":true}"#,
    ];
    for body in bodies {
        let error = command.prepare(body).unwrap_err();
        assert!(matches!(error, CommandError::Malformed(_)), "{}", String::from_utf8_lossy(body));
    }
}

#[test]
fn a_command_on_an_unknown_aggregate_type_is_a_mistake() {
    assert!(Domain::builder().command::<WriteNote>().build().is_err());
    let twice = Domain::builder().aggregate("note", Notes).command::<WriteNote>();
    assert!(twice.command::<WriteNote>().build().is_err());
}

#[test]
fn partitions_are_of_one_aggregate_type() {
    let definition = notes();
    assert!(definition.partition_of(&note("n-1")).is_some_and(|partition| partition < 2));
    let name = Name::new("other").unwrap();
    let other = consistency::AggregateId::new(name, "n-1").unwrap();
    assert_eq!(definition.partition_of(&other), None);
}

#[test]
fn a_projection_may_spread_its_aggregates_in_its_own_way() {
    let by_length = |aggregate: &AggregateId, _: PartitionCount| aggregate.id().len() as u16;
    let definition = declared(1).partitions(4).partitioned_by(by_length).build().unwrap();
    assert_eq!(definition.partition_of(&note("n")), Some(1));
    assert_eq!(definition.partition_of(&note("n-1")), Some(3));
    assert_eq!(definition.partition_of(&note("n-1234")), Some(2), "modulo the count");
    let written = event(&note("n"), 1, 1, "Written", r#"{"owner":"o","text":"t"}"#);
    let document = definition.document().unwrap();
    let applied = document.apply(&note("n"), StoredState::NOTHING, &[&written]);
    assert_eq!(Changes::gather(&definition, vec![applied]).states.partitions, [1]);
}

#[test]
fn a_domain_says_what_its_json_looks_like_and_of_nothing_that_it_does_not_have() {
    #[derive(JsonSchema)]
    struct Shown {
        #[expect(dead_code, reason = "it is only described")]
        owner: String,
    }
    let described = |view: &str| {
        let domain = Domain::builder().aggregate("note", Notes).command::<WriteNote>();
        domain.projection(declared(1)).view_schema::<Shown>(view).build()
    };
    let domain = described("note").unwrap();
    let mut generator = SchemaGenerator::default();
    let schema = domain.schemas().of_view("note").unwrap()(&mut generator);
    assert_eq!(schema.get("$ref"), Some(&json!("#/$defs/Shown")));
    domain.command("WriteNote").unwrap().schema()(&mut generator);
    let input = &generator.definitions()["WriteNote"];
    assert_eq!(input["additionalProperties"], false);
    assert!(input["properties"].get("note_id").is_some(), "{input}");
    let wrong = described("nowhere").unwrap_err();
    assert_eq!(wrong.mistakes(), ["schema of nowhere, which is no view"]);
}
