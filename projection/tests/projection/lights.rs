use consistency::Event;
use projection::{Document, Domain, DomainError, Fold, FoldError, Projection, Rehearsal, Rows};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Light {
    lit: bool,
}

#[derive(Serialize, Deserialize)]
enum LightEvent {
    SwitchedOn {},
    SwitchedOff {},
}

struct Lights;

impl Fold for Lights {
    type State = Light;
    type Event = LightEvent;

    fn fold(
        &self,
        _: Option<Light>,
        event: LightEvent,
        _: &Event,
    ) -> Result<Option<Light>, FoldError> {
        Ok(Some(Light { lit: matches!(event, LightEvent::SwitchedOn {}) }))
    }
}

impl Document for Lights {
    fn rows(&self, light: &Light, rows: &mut Rows<'_>) {
        let id = rows.aggregate().id().to_owned();
        rows.row("light", light);
        rows.item("lights-by-state", if light.lit { "lit" } else { "dark" }, &id);
    }
}

pub fn domain() -> Result<Domain, DomainError> {
    let views =
        Projection::document("lights", 1, "light", Lights).row("light").list("lights-by-state");
    Domain::builder().aggregate("light", Lights).projection(views).build()
}

#[test]
fn a_light_moves_from_list_to_list() -> Result<(), Box<dyn std::error::Error>> {
    let domain = domain()?;
    let mut house = Rehearsal::of(&domain);
    house.happen("light", "hall", &LightEvent::SwitchedOn {})?;
    house.happen("light", "attic", &LightEvent::SwitchedOn {})?;
    house.happen("light", "hall", &LightEvent::SwitchedOff {})?;
    assert_eq!(house.row("light", "hall")?.unwrap()["lit"], false);
    assert_eq!(house.list("lights-by-state", "lit")?, ["attic"]);
    assert_eq!(house.list("lights-by-state", "dark")?, ["hall"]);
    Ok(())
}
