"""The vocabulary of the simulator's answers."""

_TEXT = (
    "answer battery because before better bright built button camera careful charge clean clear color common compare"
    " cover damage deliver design detail device early easy engine every exact expect fabric family fast feature few"
    " final fine fresh garden gentle good great handle happy heavy house idea image item kitchen large later leather"
    " letter light little long market material matter metal minor model modern money morning narrow natural never new"
    " nothing number office often order other owner paper part pattern perfect picture plain plastic point polite"
    " price product promise quality question quick quiet reason result return review river round safe screen second"
    " service shape short simple small smooth soft solid sound special steel still strong sturdy summer surface table"
    " three time tool travel trust useful value warm water weight white window winter wonderful wood work year"
)
WORDS = tuple(_TEXT.split())
